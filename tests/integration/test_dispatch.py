"""The dispatcher against a real PostgreSQL and Redis: a bounded window, tenants in turns, and
counts that are always right.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, text

from shared.db.session import AsyncDatabase
from shared.ids import new_id
from shared.jobs import lanes, repository
from shared.jobs.estimate import queue_position, queued_eta
from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus
from shared.queue.messages import push_sync
from shared.queue.names import queue_name
from shared.queue.window import MIN_WINDOW, PushWindow, backlog_key, window_key
from shared.sampling_params import SamplingParams
from tests.integration.conftest import Jobs, WorkerProcess, eventually
from worker.dispatcher import Dispatcher

pytestmark = pytest.mark.integration


def add(jobs: Jobs, tenant: str, count: int, *, priority: str = "normal", **more: Any) -> list[str]:
    ids = sorted(new_id("job") for _ in range(count))
    params = SamplingParams(max_tokens=4, temperature=0.0, seed=1).to_json()
    common = {
        "endpoint": "/v1/completions",
        "model": jobs.model,
        "body": {},
        "params": params,
        "prompt_token_ids": [5, 6, 7],
        "tokens": 7,
        "tenant": tenant,
        "priority": priority,
        **more,
    }
    with jobs.database.write() as session:
        session.execute(insert(JOBS), [{"id": i, **common} for i in ids])
    return ids


def dispatcher(jobs: Jobs, slots: int = 8) -> Dispatcher:
    return Dispatcher(jobs.database, jobs.redis, model=jobs.model, slots=slots, stale_seconds=30)


def window(jobs: Jobs, priority: str = "normal") -> list[str]:
    """The job ids in Redis, next first."""
    raw: Any = jobs.redis.lrange(queue_name(jobs.model, priority), 0, -1)
    return [json.loads(b64decode(json.loads(m)["body"]))[0][0]["job_id"] for m in reversed(raw)]


def take(jobs: Jobs, count: int, priority: str = "normal") -> list[str]:
    """Take jobs as workers do: pop, claim, finish."""
    taken = window(jobs, priority)[:count]
    for job_id in taken:
        jobs.redis.rpop(queue_name(jobs.model, priority))
        assert jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
        jobs.execute(repository.finish(job_id, 1, JobStatus.SUCCEEDED, result={"a": 1}))
    return taken


def depths(jobs: Jobs) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (r.priority, r.tenant + r.key_id): (int(r.jobs), int(r.tokens))
        for r in jobs.execute(lanes.depths(jobs.model))
    }


def test_redis_holds_a_window_and_postgresql_the_rest(jobs: Jobs) -> None:
    ids = add(jobs, "a", 500)
    one = dispatcher(jobs)
    assert one.dispatch() == 8
    assert window(jobs) == ids[:8]
    assert one.dispatch() == 0  # full
    assert (
        jobs.redis.get(window_key(jobs.model)),
        jobs.redis.exists(backlog_key(queue_name(jobs.model, "normal"))),
    ) == (b"8", 1)
    assert take(jobs, 4) == ids[:4]
    assert one.dispatch() == 4
    assert window(jobs) == ids[4:12]


def test_another_tenants_first_job_is_in_the_next_round(jobs: Jobs) -> None:
    add(jobs, "big", 2000)
    one = dispatcher(jobs)
    for _ in range(10):
        one.dispatch()
        take(jobs, 8)
    first = add(jobs, "small", 1)[0]
    one._look_at = float("-inf")
    one.dispatch()
    assert first in window(jobs)[:2]


async def test_the_place_behind_another_tenants_jobs_can_be_told(jobs: Jobs) -> None:
    """The place is a JSON integer: a sum in PostgreSQL is a numeric unless it is cast."""
    add(jobs, "big", 3, priority="interactive")
    mine = jobs.row(add(jobs, "small", 1)[0])
    database = AsyncDatabase(jobs.database_url)
    try:
        async with database.read() as session:
            position = await queue_position(session, mine._mapping)
    finally:
        await database.dispose()
    eta = queued_eta(position, [{"slots": 3, "stats": {"jobs_succeeded": 1, "job_ms": 1000}}])
    assert json.dumps([position, eta]) == "[4, 2.0]"


def test_weights_of_keys_are_turns(jobs: Jobs) -> None:
    """Two keys of one tenant, and somebody without a key: each has turns of its own."""
    from shared.keys import repository as keys

    for key_id, weight in (("key_heavy", 3), ("key_light", 1)):
        with jobs.database.write() as session:
            session.execute(
                keys.create(
                    key_id,
                    name="h",
                    tenant="team",
                    key_hash="x",
                    scopes=["jobs"],
                    webhook_secret="s",
                    requests_per_minute=None,
                    max_queued_jobs=None,
                    max_queued_tokens=None,
                    weight=weight,
                    expires_at=None,
                )
            )
        add(jobs, "team", 100, key_id=key_id)
    add(jobs, "anonymous", 100)
    one, served = dispatcher(jobs), Counter[str]()
    for _ in range(10):
        one.dispatch()
        served.update(jobs.row(j).key_id for j in take(jobs, 8))
    assert served["key_heavy"] == pytest.approx(3 * served["key_light"], abs=4)
    assert served[""] == pytest.approx(served["key_light"], abs=4)


def test_another_key_of_the_tenant_is_in_the_next_round(jobs: Jobs) -> None:
    add(jobs, "team", 500, key_id="key_bulk")
    one = dispatcher(jobs)
    one.dispatch()
    take(jobs, 8)
    first = add(jobs, "team", 1, key_id="key_other")[0]
    one._look_at = float("-inf")
    one.dispatch()
    assert first in window(jobs)[:2]
    assert depths(jobs)["normal", "teamkey_bulk"][0] == 492


def test_deadlines_first_among_equals(jobs: Jobs) -> None:
    from datetime import UTC, datetime, timedelta

    plain = add(jobs, "a", 3)
    late = add(jobs, "a", 1, complete_by=datetime.now(UTC) + timedelta(hours=2))
    soon = add(jobs, "a", 1, start_by=datetime.now(UTC) + timedelta(hours=1))
    dispatcher(jobs).dispatch()
    assert window(jobs) == [*soon, *late, *plain]


def test_priorities_have_windows_of_their_own(jobs: Jobs) -> None:
    add(jobs, "a", 100, priority="bulk")
    one = dispatcher(jobs)
    one.dispatch()
    urgent = add(jobs, "a", 1, priority="interactive")
    one._look_at = float("-inf")
    one.dispatch()
    assert window(jobs, "interactive") == urgent
    assert len(window(jobs, "bulk")) == 8


def test_two_dispatchers_push_nothing_twice(jobs: Jobs) -> None:
    import threading

    ids = add(jobs, "a", 100)
    threads = [threading.Thread(target=dispatcher(jobs).dispatch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = window(jobs)
    assert len(found) == len(set(found)) >= 8
    assert set(found) <= set(ids)


def test_the_api_pushes_while_there_is_room_and_never_overtakes(jobs: Jobs) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(jobs.redis_url)
        push = PushWindow(client)
        queue = queue_name(jobs.model, "normal")
        got = [await push.reserve(jobs.model, "normal") for _ in range(MIN_WINDOW + 2)]
        assert got == [True] * MIN_WINDOW + [False] * 2  # those on their way count
        for _ in range(MIN_WINDOW):
            push.release(jobs.model, "normal")
        await push.leave(jobs.model, "normal")
        assert not await push.reserve(jobs.model, "normal")
        await client.delete(backlog_key(queue))
        assert await push.reserve(jobs.model, "normal")
        assert await push.push("job_x", jobs.model, "normal")
        assert window(jobs) == ["job_x"]
        await client.aclose()

    asyncio.run(main())


def test_without_redis_the_row_stays_unpushed(jobs: Jobs) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url("redis://127.0.0.1:1/0")
        push = PushWindow(client)
        assert not await push.reserve(jobs.model, "normal")
        assert not await push.push("job_x", jobs.model, "normal")
        await push.leave(jobs.model, "normal")
        await client.aclose()

    asyncio.run(main())


MOVES: dict[str, Callable[[str], Any]] = {
    "claim": lambda j: repository.claim(j, worker_id="w", lease_seconds=60),
    "drain": lambda j: repository.drain([(j, 1), (j, 2)]),
    "succeed": lambda j: repository.finish(j, 1, JobStatus.SUCCEEDED, result={"a": 1}),
    "cancel": repository.request_cancel,
    "retry": lambda j: repository.retry(j, "a", key_id=""),
    "roll up": lambda j: lanes.roll_up(),
}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 3)), max_size=20))
def test_lanes_count_what_is_queued_whatever_happens(
    jobs_module: Jobs, moves: list[tuple[str, int]]
) -> None:
    jobs = jobs_module
    jobs.model = f"m-{new_id('m')}"
    ids = [add(jobs, "a", 1, priority=p)[0] for p in ("normal", "normal", "bulk", "interactive")]
    for name, which in moves:
        statement = MOVES[name](ids[which])
        with jobs.database.write() as session:
            session.execute(statement)
    with jobs.database.write() as session:
        session.execute(text("DELETE FROM jobs WHERE id = :id"), {"id": ids[0]})
    counted = Counter(
        row.priority
        for row in jobs.execute(
            text(f"SELECT priority FROM jobs WHERE model = '{jobs.model}' AND status = 'queued'")
        )
    )
    assert {priority: n for (priority, _), (n, _) in depths(jobs).items()} == counted
    assert all(tokens == 7 * n for n, tokens in depths(jobs).values())


def test_a_rolled_back_job_is_not_counted(jobs: Jobs) -> None:
    with pytest.raises(RuntimeError), jobs.database.write() as session:
        session.execute(
            insert(JOBS),
            [
                {
                    "id": "job_r",
                    "endpoint": "/",
                    "model": jobs.model,
                    "body": {},
                    "params": {},
                    "prompt_token_ids": [],
                }
            ],
        )
        raise RuntimeError
    assert depths(jobs) == {}


def test_a_backlog_is_worked_off_by_real_workers(
    jobs: Jobs, start_worker: Callable[..., WorkerProcess]
) -> None:
    """Nobody pushes a message: the dispatcher finds 120 jobs of two tenants, and the small one is
    not last.
    """
    big, small = add(jobs, "big", 100), add(jobs, "small", 20)
    start_worker().wait_ready()
    eventually(lambda: all(jobs.row(j).status == "succeeded" for j in (*big, *small)), seconds=60)
    assert all(jobs.outcomes(j) == ["succeeded"] for j in (*big, *small))
    last_small = max(jobs.row(j).started_at for j in small)
    assert (
        sum(jobs.row(j).started_at < last_small for j in big) < 60
    )  # turns, not first come first served
    eventually(lambda: depths(jobs) == {})


def test_an_interactive_job_sets_bulk_work_aside_that_holds_every_slot(
    jobs: Jobs, start_worker: Callable[..., WorkerProcess]
) -> None:
    """Celery takes no message while its pool works; the engine is handed the urgent one all the
    same.
    """
    worker = start_worker(max_num_seqs=2).wait_ready()
    slow = [jobs.submit(slow=True) for _ in range(2)]  # as many as slots
    for job_id in slow:
        jobs.wait_progress(job_id)
    quick = jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET priority = 'interactive' WHERE id = :id"), {"id": quick}
        )
    push_sync(jobs.redis, [(quick, jobs.model, "interactive")])
    assert jobs.wait_done(quick).status == "succeeded"
    assert [jobs.row(job_id).status for job_id in slow] == ["running", "running"]
    eventually(
        lambda: (row := worker.row()) and row.stats["engine"]["preemptions"] > 0, what="counted"
    )
    for job_id in slow:
        row = jobs.wait_done(job_id, seconds=90)
        assert (row.status, row.attempt) == ("succeeded", 1)  # it went on where it was
