"""A worker process at work: jobs run once, whatever is sent twice, lost or cancelled."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from shared import serving
from shared.events import CANCEL_CHANNEL, events_key
from shared.jobs import repository
from shared.jobs.status import JobStatus
from shared.queue.messages import job_message
from shared.queue.names import queue_name
from tests.integration.conftest import Jobs, WorkerProcess, eventually

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]


def test_a_job_runs_and_everything_about_it_is_recorded(served_jobs: Jobs) -> None:
    job_id = served_jobs.submit(n=2, max_tokens=8)
    row = served_jobs.wait_done(job_id)
    assert (row.status, row.attempt, row.failures) == ("succeeded", 1, 0)
    assert [c["index"] for c in row.result["choices"]] == [0, 1]
    assert row.usage["prompt_tokens"] == 3
    assert row.usage["completion_tokens"] == row.result["usage"]["completion_tokens"]
    assert row.timing["total_ms"] >= row.timing["denoise_ms"] > 0
    assert row.diffusion["forwards"] > 0
    assert (row.worker_id, row.lease_until) == (None, None)
    kinds = eventually(
        lambda: (
            (
                k := [f[b"t"].decode() for _, f in served_jobs.redis.xrange(events_key(job_id))]  # type: ignore[union-attr]
            )
            and k[-1] == "done"
            and k
        )
    )
    assert kinds[0] == "started"
    assert {"progress", "denoise"} <= set(kinds)
    assert served_jobs.redis.ttl(events_key(job_id)) > 0


def test_the_worker_registers_and_its_numbers_move(served_jobs: Jobs) -> None:
    def worker() -> Any:
        with served_jobs.database.read() as session:
            return session.execute(text("SELECT * FROM workers ORDER BY started_at")).first()

    row = worker()
    assert (row.state, row.slots, row.device, row.model) == ("ready", 4, "cpu", served_jobs.model)
    before = row.stats.get("tokens_generated", 0)
    served_jobs.wait_done(served_jobs.submit(max_tokens=8))
    eventually(lambda: worker().stats.get("tokens_generated", 0) > before)
    assert worker().stats["engine"]["steps"] > 0


def test_a_message_that_comes_three_times_runs_once(served_jobs: Jobs) -> None:
    job_ids = [served_jobs.submit(push=3) for _ in range(10)]
    for job_id in job_ids:
        assert served_jobs.wait_done(job_id).attempt == 1
        assert served_jobs.outcomes(job_id) == ["succeeded"]


def test_a_job_that_was_never_pushed_is_found(served_jobs: Jobs) -> None:
    assert served_jobs.wait_done(served_jobs.submit(push=0)).status == "succeeded"


def test_redis_loses_everything(served_jobs: Jobs) -> None:
    running = served_jobs.submit(slow=True)
    served_jobs.wait_status(running, JobStatus.RUNNING)
    job_ids = [served_jobs.submit() for _ in range(20)]
    served_jobs.redis.flushdb()
    for job_id in (*job_ids, running):
        assert served_jobs.wait_done(job_id).status == "succeeded"
        assert served_jobs.outcomes(job_id) == ["succeeded"]


@pytest.mark.parametrize("fast", [True, False], ids=["published", "heartbeat"])
def test_cancel_in_mid_job(served_jobs: Jobs, fast: bool) -> None:
    job_id = served_jobs.submit(slow=True)
    served_jobs.wait_status(job_id, JobStatus.RUNNING)
    assert served_jobs.execute(repository.request_cancel(job_id))[0].status == "running"
    if fast:
        served_jobs.redis.publish(CANCEL_CHANNEL, job_id)
    row = served_jobs.wait_done(job_id)
    assert (row.status, row.error["code"]) == ("cancelled", "cancelled")
    assert served_jobs.outcomes(job_id) == ["cancelled"]


def test_interactive_jobs_go_before_bulk(jobs: Jobs, start_worker: Start) -> None:
    bulk = [jobs.submit(push=0) for _ in range(6)]
    urgent = [jobs.submit(push=0) for _ in range(3)]
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET priority = 'bulk' WHERE id = ANY(:ids)"), {"ids": bulk}
        )
        session.execute(
            text("UPDATE jobs SET priority = 'interactive' WHERE id = ANY(:ids)"), {"ids": urgent}
        )
    for job_id, priority in [(j, "bulk") for j in bulk] + [(j, "interactive") for j in urgent]:
        jobs.redis.lpush(*job_message(job_id, queue_name(jobs.model, priority)))
    start_worker(max_num_seqs=1, sweep_seconds=60, lease_seconds=240, repush_after_seconds=60)
    for job_id in (*bulk, *urgent):
        jobs.wait_done(job_id, seconds=60)
    started = sorted((jobs.row(j).started_at, j) for j in (*bulk, *urgent))
    assert {j for _, j in started[:3]} == set(urgent)


def test_drain_gives_back_what_is_not_done(jobs: Jobs, start_worker: Start) -> None:
    worker = start_worker(drain_seconds=0.3).wait_ready()
    job_id = jobs.submit(slow=True, n=4)
    jobs.wait_status(job_id, JobStatus.RUNNING)
    worker.signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    row = jobs.row(job_id)
    assert (row.status, row.failures) == ("queued", 0)
    assert jobs.outcomes(job_id) == ["drained"]
    stopped = worker.row()
    assert stopped is not None
    assert stopped.state == "stopped"
    start_worker().wait_ready()
    jobs.wait_status(job_id, JobStatus.RUNNING)  # its message is there again
    jobs.execute(repository.request_cancel(job_id))


def test_drain_lets_short_jobs_finish(jobs: Jobs, start_worker: Start) -> None:
    for model in (jobs.model, "another-model"):
        with jobs.database.write() as session:
            session.execute(
                serving.record_failure(
                    hostname=socket.gethostname(),
                    model=model,
                    code="c",
                    message="m",
                    pid=1,
                    version="1",
                )
            )
    worker = start_worker(drain_seconds=20).wait_ready()
    # What kept the model from loading here is over; what keeps another one from it may not be.
    assert [row.model for row in jobs.execute(serving.recent_failures())] == ["another-model"]
    job_id = jobs.submit(slow=True)
    jobs.wait_status(job_id, JobStatus.RUNNING)
    worker.signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert jobs.row(job_id).status == "succeeded"
