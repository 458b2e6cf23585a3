"""Old and new programs together: what one cannot read is left for the other, and a worker that goes
loses nothing.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import text

from shared.db.session import AsyncDatabase
from shared.ids import new_id
from shared.jobs import repository
from shared.jobs.formats import UNDERSTOOD_FORMAT
from shared.jobs.service import JobService, Prepared
from shared.jobs.status import JobStatus
from shared.keys.principal import Limits
from shared.queue.messages import PAYLOAD_VERSION, push_sync, task_message
from shared.queue.names import GENERATE_TASK, queue_name
from shared.served_models import ServedModels
from shared.settings import load_settings
from shared.watch import JobWatch
from tests.integration.conftest import Jobs, WorkerProcess, eventually

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]


def test_a_message_of_a_newer_program_does_not_lose_its_job(
    jobs: Jobs, start_worker: Start
) -> None:
    """The worker leaves it, and the row waits for its message again at once: no sweeper is needed
    for it here.
    """
    job_id = jobs.submit(push=0)
    jobs.execute(
        text("UPDATE jobs SET pushed_at = now() WHERE id = :i RETURNING id").bindparams(i=job_id)
    )
    queue = queue_name(jobs.model, "normal")
    jobs.redis.lpush(
        queue,
        task_message(GENERATE_TASK, {"v": PAYLOAD_VERSION + 1, "job_id": job_id}, job_id, queue),
    )
    worker = start_worker(sweep_seconds=3600, lease_seconds=4 * 3600).wait_ready()
    assert jobs.wait_done(job_id).status == JobStatus.SUCCEEDED
    assert jobs.outcomes(job_id) == ["succeeded"]
    assert "payload_version_unknown" in worker.log.read_text()
    # A row that a newer program wrote is not even tried, and waits for a worker that understands
    # it.
    newer, after = jobs.submit(push=0), None
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET format = :f WHERE id = :i"),
            {"f": UNDERSTOOD_FORMAT + 1, "i": newer},
        )
    push_sync(jobs.redis, [(newer, jobs.model, "normal")] * 3)
    after = jobs.submit()
    jobs.wait_done(after)
    eventually(lambda: jobs.redis.llen(queue) == 0, what="its messages are read")
    assert (jobs.row(newer).status, jobs.row(newer).attempt) == ("queued", 0)
    claim = repository.claim(
        newer, worker_id="newer", lease_seconds=60, understands=UNDERSTOOD_FORMAT + 1
    )
    assert [row.attempt for row in jobs.execute(claim)] == [1]


def test_a_new_worker_takes_over_from_an_old_one(jobs: Jobs, start_worker: Start) -> None:
    """A rollout: the new one comes, the old one drains with jobs in its hands and jobs behind them."""
    old = start_worker(drain_seconds=0.2).wait_ready()
    ids = [jobs.submit(max_tokens=160, max_attempts=1) for _ in range(10)]
    eventually(lambda: any(jobs.row(i).status == "running" for i in ids), what="the old one works")
    new = start_worker().wait_ready()
    old.signal(signal.SIGTERM)
    ids += [jobs.submit(max_attempts=1) for _ in range(3)]
    assert old.wait(240) == 0
    for job_id in ids:
        row = jobs.wait_done(job_id, seconds=60)
        assert (row.status, row.failures) == ("succeeded", 0)
        assert jobs.outcomes(job_id) in (["succeeded"], ["drained", "succeeded"])
    stopped, goes_on = old.row(), new.row()
    assert stopped is not None and goes_on is not None
    assert (stopped.state, goes_on.state) == ("stopped", "ready")
    assert {jobs.row(i).attempt for i in ids} <= {1, 2}


async def nothing_over(job_ids: Sequence[str]) -> list[str]:
    return []


def _in_process(jobs: Jobs, use: Callable[[JobService], Any]) -> Any:
    async def main() -> Any:
        database, client = (
            AsyncDatabase(jobs.database_url),
            redis.asyncio.Redis.from_url(jobs.redis_url),
        )
        try:
            waiter = JobWatch(client, nothing_over)
            service = JobService(
                database, client, ServedModels(database), waiter, load_settings({})
            )
            return await use(service)
        finally:
            await client.aclose()
            await database.dispose()

    return asyncio.run(main())


def test_the_clock_of_an_api_machine_does_not_count(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock a day ahead, a message that Redis loses would be missed a day later."""
    import datetime as real

    from shared.jobs import service as module

    class Ahead(real.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.datetime.now(tz) + real.timedelta(days=1)

    monkeypatch.setattr(module, "datetime", Ahead, raising=False)
    job_id = new_id("job")
    values = {
        "id": job_id,
        "tenant": "t",
        "key_id": "",
        "endpoint": "/v1/completions",
        "model": jobs.model,
        "body": {},
        "priority": "normal",
        "params": {},
        "prompt_token_ids": [1],
        "tokens": 1,
        "idempotency_key": None,
    }
    prepared = Prepared(job_id, None, values, automatic_retry=False, limits=Limits())  # type: ignore[arg-type]
    assert _in_process(jobs, lambda service: service.enqueue(prepared)).created
    query = text(
        "SELECT abs(extract(epoch FROM pushed_at - now())) AS off FROM jobs WHERE id = :i"
    ).bindparams(i=job_id)
    assert jobs.execute(query)[0].off < 60
