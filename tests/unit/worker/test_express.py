"""Which urgent messages are taken past Celery's pool, and when."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from shared.jobs.status import Priority
from shared.queue.messages import job_message, read_message
from shared.queue.names import queue_name
from worker.express import Express
from worker.held import HeldAttempts

BULK, NORMAL, INTERACTIVE = Priority.BULK, Priority.NORMAL, Priority.INTERACTIVE
QUEUES = {name: queue_name("m", name) for name in ("interactive", "normal")}


def express(
    held: HeldAttempts, run: Any = print, put_back: Any = print, *, accepts: bool = True
) -> Express:
    return Express(None, held, run, put_back, model="m", slots=2, accepts=lambda: accepts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "held,wanted",
    [
        ([], []),
        ([BULK], []),
        ([BULK, BULK], ["interactive", "normal"]),
        ([BULK, NORMAL], ["interactive", "normal"]),
        ([NORMAL, NORMAL], ["interactive"]),
        ([INTERACTIVE, INTERACTIVE], []),
        ([INTERACTIVE, BULK], ["interactive", "normal"]),
        ([BULK, BULK, INTERACTIVE, INTERACTIVE], []),
        ([BULK, BULK, NORMAL, NORMAL], ["interactive"]),
    ],
)
def test_what_would_set_somebody_aside(held: list[Priority], wanted: list[str]) -> None:
    attempts = HeldAttempts()
    for number, priority in enumerate(held):
        attempts.add(f"job_{number}", 1, priority)
    assert express(attempts).wanted() == [QUEUES[name] for name in wanted]
    assert express(attempts, accepts=False).wanted() == []


def test_a_message_runs_in_a_thread_and_no_more_of_them_than_slots() -> None:
    attempts, go, ran = HeldAttempts(), threading.Event(), []
    for number in range(2):
        attempts.add(f"job_{number}", 1, BULK)

    def run(job_id: str) -> None:
        go.wait(10)
        ran.append(job_id)

    taking = express(attempts, run)
    for name in ("job_a", "job_b"):
        taking._take(job_message(name, "q")[1])
    assert taking.wanted() == []
    go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("vdiff-express job"):
            thread.join(10)
    assert sorted(ran) == ["job_a", "job_b"] and taking.wanted() != []


def test_who_shuts_down_gives_it_back_and_rubbish_stops_nothing() -> None:
    given: list[str] = []
    taking = express(HeldAttempts(), put_back=given.append, accepts=False)
    taking._take(job_message("job_a", "q")[1])
    for rubbish in (b"", b"{}", b'{"body": 1}', b"\xff"):
        assert read_message(rubbish) is None
        taking._take(rubbish)
    assert given == ["job_a"]
