"""The moves of a job against a real PostgreSQL: of two callers one wins, and a stale one gets
nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from shared import serving
from shared.db.session import AsyncDatabase, Database, is_outage
from shared.jobs import caretaking, repository
from shared.jobs.status import TERMINAL, TRANSITIONS, JobStatus
from shared.model_card import ModelCard
from tests.integration.conftest import Jobs
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
ERROR = {"code": "engine_error", "message": "m", "param": None, "retryable": True}


def claim(jobs: Jobs, job_id: str, *, lease_seconds: float = 60) -> list[Any]:
    return jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=lease_seconds))


def test_one_of_many_claimers_wins(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    won: list[Any] = []
    barrier = threading.Barrier(8)

    def race() -> None:
        barrier.wait()
        won.extend(claim(jobs, job_id))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.attempt for row in won] == [1]
    assert won[0].prompt_token_ids == [5, 6, 7]
    assert jobs.outcomes(job_id) == ["running"]


def test_finish_is_fenced_by_the_attempt(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    claim(jobs, job_id, lease_seconds=-1)
    assert [r.status for r in jobs.execute(repository.sweep_expired())] == ["queued"]
    assert claim(jobs, job_id) == []  # it was lost with its worker, and runs apart
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60, apart=True))
    done = {"result": {"text": "x"}, "usage": {}}
    assert jobs.execute(repository.finish(job_id, 1, JobStatus.SUCCEEDED, **done)) == []
    assert jobs.execute(repository.fail_attempt(job_id, 1, error=ERROR)) == []
    assert jobs.execute(repository.drain([(job_id, 1)])) == []
    assert len(jobs.execute(repository.finish(job_id, 2, JobStatus.SUCCEEDED, **done))) == 1
    assert jobs.execute(repository.finish(job_id, 2, JobStatus.FAILED, error=ERROR)) == []
    assert jobs.outcomes(job_id) == ["lost", "succeeded"]
    assert (jobs.row(job_id).failures, jobs.row(job_id).losses) == (0, 1)


def test_failures_end_at_max_attempts(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0, max_attempts=2)
    for attempt in (1, 2):
        claim(jobs, job_id, lease_seconds=-1)
        jobs.execute(repository.fail_attempt(job_id, attempt, error=ERROR))
    row = jobs.row(job_id)
    assert (row.status, row.failures, row.error["code"]) == ("failed", 2, "engine_error")
    assert claim(jobs, job_id) == []


def test_a_drain_counts_no_failure(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0, max_attempts=1)
    for attempt in (1, 2, 3):
        claim(jobs, job_id)
        assert [r.status for r in jobs.execute(repository.drain([(job_id, attempt)]))] == ["queued"]
    row = jobs.row(job_id)
    assert (row.failures, row.attempt, row.pushed_at) == (0, 3, None)
    assert jobs.outcomes(job_id) == ["drained"] * 3


def test_heartbeat_renews_what_is_held_and_only_that(jobs: Jobs) -> None:
    first, second = jobs.submit(push=0), jobs.submit(push=0)
    claim(jobs, first)
    claim(jobs, second)
    jobs.execute(repository.request_cancel(second))
    before = jobs.row(first).lease_until
    beat = repository.heartbeat(
        {(first, 1): {"step": 3}, (second, 1): None, ("job_gone", 1): None}, lease_seconds=90
    )
    assert {(r.id, r.cancel_requested) for r in jobs.execute(beat)} == {
        (first, False),
        (second, True),
    }
    assert jobs.row(first).lease_until > before
    assert jobs.row(first).progress == {"step": 3}
    jobs.execute(repository.heartbeat({(first, 1): None}, lease_seconds=90))
    assert jobs.row(first).progress == {"step": 3}
    assert jobs.execute(repository.heartbeat({(first, 2): None}, lease_seconds=90)) == []


def test_cancel(jobs: Jobs) -> None:
    queued, running = jobs.submit(push=0), jobs.submit(push=0)
    claim(jobs, running)
    assert [r.status for r in jobs.execute(repository.request_cancel(queued))] == ["cancelled"]
    assert jobs.row(queued).error["code"] == "cancelled"
    assert claim(jobs, queued) == []
    assert [r.status for r in jobs.execute(repository.request_cancel(running))] == ["running"]
    assert jobs.execute(repository.request_cancel(queued)) == []
    assert jobs.execute(repository.request_cancel("job_unknown")) == []
    # Its worker drains or dies before it saw the flag: cancelled all the same.
    assert [r.status for r in jobs.execute(repository.drain([(running, 1)]))] == ["cancelled"]


MOVES = {
    "claim": lambda j: repository.claim(j, worker_id="w", lease_seconds=60),
    "succeed": lambda j: repository.finish(j, 1, JobStatus.SUCCEEDED, result={"a": 1}),
    "fail": lambda j: repository.finish(j, 1, JobStatus.FAILED, error=ERROR),
    "cancelled": lambda j: repository.finish(
        j, 1, JobStatus.CANCELLED, error=repository.CANCELLED_ERROR
    ),
    "retryable": lambda j: repository.fail_attempt(j, 1, error=ERROR),
    "drain": lambda j: repository.drain([(j, 1)]),
    "cancel": repository.request_cancel,
    "sweep": lambda j: repository.sweep_expired(),
    "expire": lambda j: repository.finish(j, 1, JobStatus.EXPIRED, error=repository.MAX_RUN_ERROR),
    "deadlines": lambda j: caretaking.sweep_deadlines(grace_seconds=0),
    "revision_gone": lambda j: caretaking.fail_unservable(silent_seconds=60),
    "retry": lambda j: repository.retry(j, "anonymous", key_id=""),
    "purge": lambda j: repository.purge(j, "anonymous"),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(MOVES, MOVES)))
def test_no_sequence_of_moves_leaves_the_transition_table(
    jobs_module: Jobs, first: str, second: str
) -> None:
    jobs = jobs_module
    job_id = jobs.submit(push=0)
    seen = [JobStatus(jobs.row(job_id).status)]
    for name in ("claim", first, second):
        jobs.execute(MOVES[name](job_id))
        seen.append(JobStatus(jobs.row(job_id).status))
    for before, after in itertools.pairwise(seen):
        assert before == after or after in TRANSITIONS[before]
    final = jobs.row(job_id)
    assert (final.finished_at is not None) == (final.status in TERMINAL)


def test_repush_candidates(jobs: Jobs) -> None:
    fresh, old, never = jobs.submit(push=0), jobs.submit(push=0), jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET queued_at = now() - interval '60 s'"))
    jobs.execute(repository.mark_pushed([fresh, old]).returning(repository.JOBS.c.id))
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET pushed_at = now() - interval '60 s' WHERE id = :id"), {"id": old}
        )
    found = jobs.execute(
        caretaking.repush_candidates(jobs.model, "normal", repush_after_seconds=15, limit=10)
    )
    assert [row.id for row in found] == [old]  # what was never pushed is the dispatcher's
    assert never not in [row.id for row in found]
    counts = jobs.execute(caretaking.pushed_counts())
    assert [(row.model, row.priority, row.count) for row in counts] == [(jobs.model, "normal", 2)]


def test_idempotency_keys_are_freed_after_a_day(jobs: Jobs) -> None:
    old, new = jobs.submit(push=0), jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET idempotency_key = id"))
        session.execute(
            text("UPDATE jobs SET created_at = now() - interval '25 h' WHERE id = :id"), {"id": old}
        )
    assert [
        r.id for r in jobs.execute(caretaking.forget_idempotency_keys(older_than_seconds=86_400))
    ] == [old]
    assert jobs.row(new).idempotency_key == new


def test_the_same_statements_serve_asyncpg(jobs: Jobs) -> None:
    job_id, other = jobs.submit(push=0), jobs.submit(push=0)

    async def main() -> None:
        database = AsyncDatabase(jobs.database_url)
        async with database.write() as session:
            row = (
                await session.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
            ).one()
            beat = repository.heartbeat({(job_id, row.attempt): {"step": 1}}, lease_seconds=60)
            assert (await session.execute(beat)).one().cancel_requested is False
            end = repository.finish(
                job_id, 1, JobStatus.SUCCEEDED, result={"a": [1]}, usage={"n": 1}
            )
            assert (await session.execute(end)).one().status == "succeeded"
            assert (
                await session.execute(repository.request_cancel(other))
            ).one().status == "cancelled"
            await session.execute(repository.mark_pushed([other]))
            assert (await session.execute(repository.sweep_expired())).all() == []
        async with database.read() as session:
            assert (await session.execute(caretaking.pushed_counts())).all() == []
        await database.dispose()

    asyncio.run(main())
    assert jobs.row(job_id).result == {"a": [1]}


@pytest.mark.parametrize(
    "statement,outage",
    [
        ("SELECT pg_terminate_backend(pg_backend_pid())", True),
        ("SET statement_timeout = 1; SELECT pg_sleep(1)", True),
        ("SET TRANSACTION READ ONLY; CREATE TABLE t (x int)", True),
        ("SELECT 1/0", False),
        ("SELECT nothing", False),
        ("INSERT INTO jobs (id) VALUES (NULL)", False),
    ],
)
def test_what_a_later_try_may_not_meet(jobs: Jobs, statement: str, outage: bool) -> None:
    async def asked() -> None:
        database = AsyncDatabase(jobs.database_url)
        try:
            async with database.write() as session:
                for one in statement.split("; "):
                    await session.execute(text(one))
        finally:
            await database.dispose()

    with pytest.raises(SQLAlchemyError) as of_asyncpg:
        asyncio.run(asked())
    with pytest.raises(SQLAlchemyError) as of_psycopg, jobs.database.write() as session:
        session.execute(text(statement))
    assert [is_outage(of_asyncpg.value), is_outage(of_psycopg.value)] == [outage, outage]


def test_nobody_there_is_an_outage() -> None:
    async def asked() -> None:
        async with AsyncDatabase(f"postgresql://x@127.0.0.1:{free_port()}/x").read() as session:
            await session.execute(text("SELECT 1"))

    with pytest.raises((SQLAlchemyError, OSError)) as away:
        asyncio.run(asked())
    assert is_outage(away.value)


def test_a_failed_unit_of_work_leaves_nothing(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    with pytest.raises(RuntimeError), jobs.database.write() as session:
        session.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
        raise RuntimeError
    assert jobs.row(job_id).status == "queued"
    assert jobs.outcomes(job_id) == []


def test_models_keep_their_position_and_workers_go_stale(jobs: Jobs) -> None:
    def card(name: str, context: int = 64) -> ModelCard:
        return ModelCard(name, "llada", context, 10, 1, (2,), {}, {})

    def names() -> list[str]:
        return [row.name for row in jobs.execute(serving.list_models())]

    with jobs.database.write() as session:
        for name in ("b", "a"):
            session.execute(serving.register_model(card(name), {"tokenizer.json": "{}"}))
        session.execute(serving.register_model(card("b", 128), {"tokenizer.json": "{}"}))
        for worker, model in (("w1", "a"), ("w2", "b")):
            session.execute(
                serving.register_worker(
                    worker,
                    model=model,
                    revision=None,
                    hostname="h",
                    pid=1,
                    device="cpu",
                    slots=2,
                    version="1",
                )
            )
    assert names() == ["b", "a"]
    assert ModelCard.from_json(jobs.execute(serving.get_model("b"))[0].card).context_length == 128
    assert [w.id for w in jobs.execute(serving.live_workers(stale_seconds=30, model="a"))] == ["w1"]
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE workers SET last_beat_at = now() - interval '60 s' WHERE id = 'w1'")
        )
        session.execute(serving.mark_stopped("w2"))
    assert jobs.execute(serving.live_workers(stale_seconds=30)) == []
    assert [w.id for w in jobs.execute(serving.stop_silent_workers(silent_seconds=30))] == ["w1"]


def test_a_database_that_is_gone_is_an_outage(jobs: Jobs) -> None:
    with (
        pytest.raises(SQLAlchemyError) as gone,
        Database(f"{jobs.database_url}_gone").read() as session,
    ):
        session.execute(text("SELECT 1"))
    assert is_outage(gone.value)

    async def asked() -> None:
        async with AsyncDatabase(f"{jobs.database_url}_gone").read() as session:
            await session.execute(text("SELECT 1"))

    with pytest.raises(SQLAlchemyError) as away:
        asyncio.run(asked())
    assert is_outage(away.value)
