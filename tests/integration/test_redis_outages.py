"""Redis that refuses: worker, sender and API keep their processes, and take work again while a long
job runs.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy import text

from shared.events import CANCEL_CHANNEL
from shared.jobs import repository
from shared.jobs.status import JobStatus
from shared.queue.names import WEBHOOK_QUEUE, queue_name
from shared.webhooks import repository as webhooks
from shared.webhooks.secrets import new_secret
from tests.integration.conftest import (
    ApiProcess,
    Jobs,
    WorkerProcess,
    eventually,
    jobs_with_database,
)
from tests.integration.redis_faults import FAULTS
from tests.integration.test_webhooks import start_deliver
from vdiff.embedded import EmbeddedRedis

pytestmark = pytest.mark.integration
FAULT_SECONDS = 3.0
PICKED_UP_SECONDS = 10.0  # less than the lease and than a round of the sweeper, which are long here


@dataclass
class Stack:
    jobs: Jobs
    server: EmbeddedRedis
    admin: redis.Redis
    worker: WorkerProcess
    deliver: subprocess.Popen[bytes]
    api: ApiProcess
    received: list[str]
    receiver: str

    def alive(self) -> bool:
        return all(p.poll() is None for p in (self.worker.process, self.deliver, self.api.process))


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[str, list[str]]]:
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            received.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def stack(
    postgres_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
    receiver: tuple[str, list[str]],
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("outages")
    with ExitStack() as exits:
        server = EmbeddedRedis(folder / "redis")
        exits.callback(server.stop)
        url = server.start()
        admin = redis.Redis.from_url(url)
        exits.callback(admin.close)
        jobs = jobs_with_database(postgres_url, url, migrated_template, exits)
        # Leases and the sweeper do not help here: what is taken is taken by the consumer and the
        # dispatcher.
        slow = {
            "lease_seconds": 2400,
            "heartbeat_seconds": 5,
            "sweep_seconds": 600,
            "repush_after_seconds": 600,
        }
        worker = WorkerProcess(jobs, folder / "worker.log", max_num_seqs=4, **slow)
        exits.callback(worker.end)
        deliver = start_deliver(jobs, folder / "deliver.log")
        exits.callback(lambda: (deliver.kill(), deliver.wait()))
        api = ApiProcess(jobs, folder / "api.log", **slow)
        exits.callback(api.end)
        worker.wait_ready()
        api.wait_ready()
        yield Stack(jobs, server, admin, worker, deliver, api, receiver[1], receiver[0])


def long_jobs(stack: Stack, count: int) -> list[str]:
    job_ids = [stack.jobs.submit(slow=True, n=2, max_tokens=1900) for _ in range(count)]
    for job_id in job_ids:
        stack.jobs.wait_status(job_id, JobStatus.RUNNING)
    return job_ids


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_ends_and_nothing_is_deaf(stack: Stack, fault: str) -> None:
    begin, end = FAULTS[fault]
    jobs = stack.jobs
    running = long_jobs(stack, 1)
    begin(stack.server, stack.admin)
    try:
        time.sleep(FAULT_SECONDS)
        assert stack.alive()
        during = jobs.submit(push=0)  # as the API stores it: PostgreSQL alone is needed
    finally:
        end(stack.server, stack.admin)
    after = jobs.submit(push=0)
    hook = webhook(stack, f"/{fault}")
    for job_id in (during, after):
        eventually(
            lambda j=job_id: jobs.row(j).attempt == 1, seconds=PICKED_UP_SECONDS, what="picked up"
        )
    eventually(lambda: f"/{fault}" in stack.received, seconds=60, what=f"{hook} delivered")
    assert stack.alive(), "same processes: the model was not loaded again"
    assert jobs.row(running[0]).attempt == 1
    long, short = jobs.row(running[0]), jobs.wait_done(after)
    assert long.status == "running" or long.finished_at > short.finished_at, (
        "the others did not wait for it"
    )
    for job_id in running:
        jobs.execute(repository.request_cancel(job_id))
        jobs.redis.publish(CANCEL_CHANNEL, job_id)
        jobs.wait_done(job_id)


def webhook(stack: Stack, path: str) -> str:
    """Submit a job whose end is reported to this path of the receiver; return its id."""
    job_id = stack.jobs.submit(push=0)
    with stack.jobs.database.write() as session:
        session.execute(webhooks.ensure_secret("anonymous", new_secret()))
        session.execute(
            text(
                "UPDATE jobs SET status = 'queued', webhook = jsonb_build_object('events', "
                "jsonb_build_array('job.cancelled', 'job.succeeded'), 'url', CAST(:url AS text)) WHERE id = :id"
            ),
            {"url": stack.receiver + path, "id": job_id},
        )
    return job_id


def total(stack: Stack, name: str) -> float:
    """Return the sum of all series of that name at /metrics."""
    lines = httpx.get(f"{stack.api.url}/metrics", timeout=120).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith((f"{name}{{", f"{name} "))
    )


@pytest.mark.parametrize(
    "name",
    [
        "vdiff_api_duty_failures_total",
        "vdiff_worker_duty_failures_total",
        "vdiff_sender_duty_failures_total",
        "vdiff_worker_consumer_restarts_total",
        "vdiff_sender_consumer_restarts_total",
    ],
)
def test_the_refusals_were_counted(stack: Stack, name: str) -> None:
    eventually(lambda: total(stack, name) > 0, what=name)


CHANNELS = (
    "/7.celery.pidbox",
    "/0.celery.pidbox",
    "vdiff:cancel",
    "vdiff:dispatch",
    "vdiff:done",
    "vdiff:who-waits",
)
GARBAGE = [
    b"",
    b"\xff\xfe",
    b"no json",
    b"[]",
    b"{}",
    b"null",
    b"42",
    b'"text"',
    b"[" * 100_000,
    b'{"headers": 1, "properties": 2, "body": 3}',
    b'{"headers": {"task": "vdiff.generate", "id": "x"}, "properties": {}, "body": "e30="}',
    b'{"headers": {"task": "nothing", "id": "x"}, "properties": {"delivery_info": {}, "delivery_tag": "t", '
    b'"body_encoding": "base64"}, "content-type": "application/json", "content-encoding": "utf-8", '
    b'"body": "W1t7fV0sIHt9LCB7fV0="}',
]


def test_a_message_that_is_none_of_ours_ends_nothing(stack: Stack) -> None:
    jobs = stack.jobs
    for queue in (
        queue_name(jobs.model, "normal"),
        queue_name(jobs.model, "interactive"),
        WEBHOOK_QUEUE,
    ):
        for message in GARBAGE:
            jobs.redis.lpush(queue, message)
    for message in (b"garbage", b"{}", b"[]", b'{"method": 1}', b"\xff"):
        for channel in CHANNELS:
            jobs.redis.publish(channel, message)
    assert jobs.wait_done(jobs.submit()).status == "succeeded"
    eventually(lambda: not jobs.redis.llen(WEBHOOK_QUEUE), what="the sender read them")
    webhook(stack, "/garbage")
    eventually(lambda: "/garbage" in stack.received, what="delivered")
    assert stack.alive()

    eventually(
        lambda: total(stack, "vdiff_worker_messages_dropped_total") >= 2 * (len(GARBAGE) - 1),
        what="counted",
    )
    eventually(
        lambda: total(stack, "vdiff_sender_messages_dropped_total") >= len(GARBAGE) - 1,
        what="counted",
    )
    assert "message_dropped" in stack.worker.log.read_text(errors="replace")
