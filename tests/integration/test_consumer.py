"""Celery's consumer as worker and sender run it, against a Redis that refuses: it takes work again
beside a long job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from shared.queue.messages import job_message
from shared.queue.names import queue_name
from tests.integration.conftest import ROOT, eventually
from tests.integration.redis_faults import FAULTS
from vdiff.embedded import EmbeddedRedis

pytestmark = pytest.mark.integration
SLOTS = 3
FAULT_SECONDS = 2.0
CONSUME = f"""
import signal, sys, threading
from celery.worker import state
from shared.background import Pulse
from shared.metrics import WORKER_CONSUMER_RESTARTS, WORKER_DUTY_FAILURES, WORKER_MESSAGES_DROPPED
from worker.app import celery_app
from worker.consumer import make_controller
from worker.tasks import register_tasks

url = sys.argv[1]
ended = threading.Event()

def run(job_id):
    print("began", job_id, flush=True)
    if job_id.startswith("long"):
        ended.wait(120)
    print("ended", job_id, flush=True)

def stop(number, frame):
    state.should_stop = 0
    ended.set()

signal.signal(signal.SIGTERM, stop)
app = celery_app(url, model="m", dropped=WORKER_MESSAGES_DROPPED)
register_tasks(app, run, lambda job_id: None)
pulse = Pulse("consumer")
controller = make_controller(
    app, name="t@t", redis_url=url, slots={SLOTS}, pulse=pulse, failures=WORKER_DUTY_FAILURES,
    restarts=WORKER_CONSUMER_RESTARTS, on_gone=lambda reason: print("gone", reason, flush=True),
)
controller.start()
print("dropped", int(WORKER_MESSAGES_DROPPED._value.get()), flush=True)
print("restarts", int(WORKER_CONSUMER_RESTARTS._value.get()), flush=True)
"""


class Consumer:
    """A consumer in a process of its own, and its Redis."""

    def __init__(self, folder: Path) -> None:
        self.server = EmbeddedRedis(folder / "redis")
        self.url = self.server.start()
        self.client = redis.Redis.from_url(self.url)
        self.log = folder / "log"
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CONSUME, self.url],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=output,
            )

    def push(self, job_id: str, *, priority: str = "normal") -> None:
        self.client.lpush(*job_message(job_id, queue_name("m", priority)))

    def wait(self, line: str) -> None:
        def seen() -> bool:
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            return line in self.log.read_text(errors="replace").splitlines()

        eventually(seen, seconds=90, what=line)

    def says(self, word: str) -> str:
        """Stop it in good order; return what it said last of `word`."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(240) == 0
        lines = self.log.read_text(errors="replace").splitlines()
        return next(line for line in reversed(lines) if line.startswith(word + " "))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        self.server.stop()


@pytest.fixture
def consumer(tmp_path: Path) -> Iterator[Consumer]:
    made = Consumer(tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize("fault", FAULTS)
def test_it_takes_work_again_while_a_long_job_runs(consumer: Consumer, fault: str) -> None:
    begin, end = FAULTS[fault]
    consumer.push("long-1")
    consumer.wait("began long-1")
    begin(consumer.server, consumer.client)
    try:
        time.sleep(FAULT_SECONDS)
    finally:
        end(consumer.server, consumer.client)
    for number in range(2 * SLOTS):  # more than there are slots: what ended gave its slot back
        consumer.push(f"job-{number}")
    for number in range(2 * SLOTS):
        consumer.wait(f"ended job-{number}")
    text = consumer.log.read_text(errors="replace")
    assert "ended long-1" not in text.splitlines() and "gone" not in text
    assert consumer.process.poll() is None


GARBAGE = [
    b"",
    b"\xff\xfe",
    b"no json",
    b"[]",
    b"{}",
    b"null",
    b"42",
    b"[" * 100_000,
    b'{"headers": {"task": "vdiff.generate", "id": "x"}, "properties": {}, "body": "e30="}',
    b'{"headers": {"task": "nothing", "id": "x"}, "properties": {"delivery_info": {}, "delivery_tag": "t", '
    b'"body_encoding": "base64"}, "content-type": "application/json", "content-encoding": "utf-8", '
    b'"body": "W1t7fV0sIHt9LCB7fV0="}',
]


def test_no_message_ends_it(consumer: Consumer) -> None:
    consumer.push("long-1")
    consumer.wait("began long-1")
    for message in GARBAGE:
        consumer.client.lpush(queue_name("m", "normal"), message)
    for message in (
        b"x",
        b"{}",
        b"[]",
        b'{"method": 1}',
        b"\xff",
        b'{"body": 1, "headers": 2, "properties": 3}',
    ):
        consumer.client.publish("/0.celery.pidbox", message)
    consumer.push("job-1")
    consumer.wait("ended job-1")
    assert int(consumer.says("dropped").split()[1]) >= len(GARBAGE) - 1


def test_a_fault_of_celery_itself_starts_it_again(consumer: Consumer) -> None:
    """A key of another type where a queue should be: nothing of ours does that, and nothing must
    end of it.
    """
    consumer.push("long-1")
    consumer.wait("began long-1")
    consumer.client.set(queue_name("m", "bulk"), "a string")
    consumer.push("job-1", priority="interactive")
    consumer.client.delete(queue_name("m", "bulk"))
    consumer.push("job-2")
    consumer.wait("ended job-1")
    consumer.wait("ended job-2")
    consumer.says("restarts")
