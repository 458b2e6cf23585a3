"""Workers that die, stop and come back: every job still finishes, and finishes once."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from sqlalchemy import text

from shared.jobs.status import JobStatus
from tests.integration.conftest import Jobs, WorkerProcess, eventually

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]


def test_kill_9_in_mid_job(jobs: Jobs, start_worker: Start) -> None:
    first = start_worker().wait_ready()
    job_id = jobs.submit(slow=True)
    others = [jobs.submit() for _ in range(8)]
    jobs.wait_status(job_id, JobStatus.RUNNING)
    first.signal(signal.SIGKILL)
    first.wait()
    start_worker().wait_ready()
    row = jobs.wait_done(job_id, seconds=60)
    assert (row.status, row.attempt, row.failures, row.losses) == ("succeeded", 2, 0, 1)
    assert jobs.outcomes(job_id) == ["lost", "succeeded"]
    for other in others:
        assert jobs.wait_done(other).status == "succeeded"
        assert jobs.outcomes(other).count("succeeded") == 1


def test_a_worker_that_was_stopped_finishes_nothing(jobs: Jobs, start_worker: Start) -> None:
    """SIGSTOP for longer than its lease: another worker takes the job, and the first one's end is
    fenced.
    """
    first = start_worker().wait_ready()
    job_id = jobs.submit(slow=True)
    jobs.wait_status(job_id, JobStatus.RUNNING)
    first.signal(signal.SIGSTOP)
    start_worker().wait_ready()
    row = jobs.wait_done(job_id, seconds=60)
    finished_at, result = row.finished_at, row.result
    first.signal(signal.SIGCONT)
    eventually(
        lambda: any(word in first.tail() for word in ("end_fenced", "lease_lost")),
        seconds=30,
        what="fenced",
    )
    after = jobs.submit()
    assert jobs.wait_done(after).status == "succeeded"
    row = jobs.row(job_id)
    assert (row.finished_at, row.result, row.attempt) == (finished_at, result, 2)
    assert jobs.outcomes(job_id) == ["lost", "succeeded"]


def test_a_hundred_jobs_and_two_murders(jobs: Jobs, start_worker: Start) -> None:
    """Some never pushed, some pushed twice, Redis flushed once, a worker killed twice: all done,
    each once.
    """
    workers = [start_worker().wait_ready(), start_worker().wait_ready()]
    job_ids = [
        jobs.submit(
            push=0 if i % 29 == 0 else 2 if i % 19 == 0 else 1, max_tokens=64, max_attempts=10
        )
        for i in range(100)
    ]
    for victim in workers:
        done = sum(jobs.row(j).status == "succeeded" for j in job_ids)
        eventually(
            lambda d=done: sum(jobs.row(j).status == "succeeded" for j in job_ids) > d,
            what="progress",
        )
        victim.signal(signal.SIGKILL)
        victim.wait()
        start_worker().wait_ready()
        jobs.redis.flushdb()
    for job_id in job_ids:
        assert jobs.wait_done(job_id, seconds=60).status == "succeeded"
        assert jobs.outcomes(job_id).count("succeeded") == 1
    with jobs.database.read() as session:
        finished = session.execute(
            text("SELECT count(*) FROM attempts WHERE outcome = 'succeeded'")
        ).scalar_one()
    assert finished == len(job_ids)
