"""`retry_failed` works in chunks: a call that breaks off between two is completed by the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import text

from shared.batches import repository, service
from shared.batches.service import BatchService
from shared.db.session import AsyncDatabase
from shared.errors import Conflict, TooManyRequests
from shared.jobs.service import JobService
from shared.keys.principal import Limits, Principal
from shared.served_models import ServedModels
from shared.settings import load_settings
from shared.watch import JobWatch
from tests.integration.conftest import Jobs

pytestmark = pytest.mark.integration

LINES, CHUNK = 10, 3
LOST = {
    "failed": range(1, 5),
    "expired": range(5, 8),
    "cancelled": range(8, 10),
}  # the last line succeeded


class Killed(BaseException):
    """The end of the process."""


@asynccontextmanager
async def batches_of(jobs: Jobs) -> AsyncIterator[BatchService]:
    async def nothing_over(job_ids: object) -> list[str]:
        return []

    database, client = (
        AsyncDatabase(jobs.database_url),
        redis.asyncio.Redis.from_url(jobs.redis_url),
    )
    try:
        settings = load_settings({})
        made = JobService(
            database, client, ServedModels(database), JobWatch(client, nothing_over), settings
        )
        yield BatchService(database, asyncio.Event(), made)
    finally:
        await client.aclose()
        await database.dispose()


def insert(jobs: Jobs, batch_id: str) -> None:
    """A batch that is over, and its jobs."""
    with jobs.database.write() as session:
        session.execute(
            text(
                "INSERT INTO batches (id, tenant, status, endpoint, input_file_id, completion_window, window_seconds, "
                "request_hash, limits, model, total, stored, expires_at, completed_at, summary) VALUES (:id, 't', "
                "'completed', '/v1/completions', 'f', '24h', 86400, '', '{}', :model, :n, :n, now(), now(), '{}')"
            ),
            {"id": batch_id, "model": jobs.model, "n": LINES},
        )
        for line in range(1, LINES + 1):
            status = next((name for name, lines in LOST.items() if line in lines), "succeeded")
            values = {
                "id": f"job_{batch_id}_{line}",
                "batch": batch_id,
                "line": line,
                "status": status,
                "model": jobs.model,
                "error": None if status == "succeeded" else "{}",
                "result": "{}" if status == "succeeded" else None,
            }
            session.execute(
                text(
                    "INSERT INTO jobs (id, tenant, endpoint, model, priority, body, params, prompt_token_ids, tokens, status, "
                    "finished_at, error, result, batch_id, batch_line) VALUES (:id, 't', '/v1/completions', :model, 'bulk', "
                    "'{}', '{}', '{1}', 5, :status, now(), CAST(:error AS jsonb), CAST(:result AS json), :batch, :line)"
                ),
                values,
            )


def lines(jobs: Jobs, batch_id: str) -> list[tuple[Any, ...]]:
    """Return the columns that a retry changes, of each line and of the batch."""
    rows = jobs.execute(
        text(
            "SELECT j.batch_line, j.status, j.life, j.key_id, j.finished_at IS NULL, j.error IS NULL, "
            "j.complete_by IS NOT DISTINCT FROM (CASE WHEN j.status = 'queued' THEN b.expires_at END), b.status, "
            "b.expires_at > now() + interval '23 h', b.holder, coalesce(b.lease_until <= now(), true), b.completed_at "
            "FROM jobs j JOIN batches b ON b.id = j.batch_id WHERE b.id = :id ORDER BY 1"
        ).bindparams(id=batch_id)
    )
    return [tuple(row) for row in rows]


def queued(jobs: Jobs, batch_id: str) -> int:
    return sum(row[1] == "queued" for row in lines(jobs, batch_id))


def caller(**limits: int) -> Principal:
    return Principal("t", frozenset(), Limits(**limits), key_id="key_x")


async def test_a_retry_that_broke_off_is_completed_by_the_next(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch_id in ("whole", "broken"):
        insert(jobs, batch_id)
    async with batches_of(jobs) as batches:
        _, retried = await batches.retry_failed("whole", caller())
        assert retried == LINES - 1
        monkeypatch.setattr(service, "RETRY_CHUNK", CHUNK)
        announced = 0

        async def die(*of: Any) -> None:
            nonlocal announced
            announced += 1
            if announced == 2:
                raise Killed

        async def write_nothing(*of: Any) -> None:
            """Do what a dead process does at its end."""

        with monkeypatch.context() as dying:
            dying.setattr(batches._jobs, "announce", die)
            dying.setattr(batches, "_let_go", write_nothing)
            with pytest.raises(Killed):
                await batches.retry_failed("broken", caller())
        assert queued(jobs, "broken") == 2 * CHUNK
        # No caretaker closes it, even when the lines that were retried are over.
        with jobs.database.write() as session:
            session.execute(
                text(
                    "UPDATE jobs SET status = 'cancelled', finished_at = now(), error = '{}' WHERE batch_line = 1 "
                    "AND batch_id = 'broken'"
                )
            )
            assert session.execute(repository.claim("holder_2", 60)).one_or_none() is None
            session.rollback()
        row, retried = await batches.retry_failed("broken", caller())
        assert (retried, row.status) == (LINES - 1 - 2 * CHUNK, "in_progress")
        assert lines(jobs, "broken") == lines(jobs, "whole")
        assert {row[2] for row in lines(jobs, "broken")} == {1, 2}  # each line has one more life
        with pytest.raises(Conflict) as refused:
            await batches.retry_failed("broken", caller())
        assert refused.value.code == "nothing_to_retry"


async def test_each_chunk_is_a_transaction(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(jobs, "b")
    monkeypatch.setattr(service, "RETRY_CHUNK", CHUNK)
    seen: list[int] = []
    async with batches_of(jobs) as batches:
        announce = batches._jobs.announce

        async def look(*of: Any) -> None:
            seen.append(queued(jobs, "b"))
            await announce(*of)

        monkeypatch.setattr(batches._jobs, "announce", look)
        assert (await batches.retry_failed("b", caller()))[1] == LINES - 1
    assert seen == [3, 6, 9, 9]


async def test_a_retry_fits_as_a_whole_or_says_how_far_it_came(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(jobs, "b")
    before = lines(jobs, "b")
    monkeypatch.setattr(service, "RETRY_CHUNK", CHUNK)
    async with batches_of(jobs) as batches:
        with pytest.raises(TooManyRequests):
            await batches.retry_failed("b", caller(queued_jobs=LINES - 2))
        assert lines(jobs, "b") == before
        announce = batches._jobs.announce

        async def fill(*of: Any) -> None:
            """Another request of the key takes the room between two chunks."""
            monkeypatch.setattr(batches._jobs, "announce", announce)
            with jobs.database.write() as session:
                session.execute(
                    text(
                        "INSERT INTO jobs (id, tenant, key_id, endpoint, model, body, params, prompt_token_ids) "
                        "SELECT 'job_' || n, 't', 'key_x', '/v1/completions', 'm', '{}', '{}', '{1}' "
                        "FROM generate_series(1, 5) n"
                    )
                )

        monkeypatch.setattr(batches._jobs, "announce", fill)
        with pytest.raises(
            TooManyRequests, match="3 lines were queued again; of the others: 8 jobs are queued"
        ):
            await batches.retry_failed("b", caller(queued_jobs=LINES - 1))
        assert queued(jobs, "b") == CHUNK
        assert jobs.execute(text("SELECT holder FROM batches WHERE id = 'b'"))[0].holder is None
        assert (await batches.retry_failed("b", caller(queued_jobs=LINES + 10)))[
            1
        ] == LINES - 1 - CHUNK


async def test_two_retries_at_once_give_each_line_one_life(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(jobs, "b")
    monkeypatch.setattr(service, "RETRY_CHUNK", CHUNK)
    async with batches_of(jobs) as one, batches_of(jobs) as other:
        made = (batches.retry_failed("b", caller()) for batches in (one, other))
        ends = await asyncio.gather(*made, return_exceptions=True)
    assert sum(end[1] for end in ends if isinstance(end, tuple)) == LINES - 1
    assert all(isinstance(end, tuple | Conflict) for end in ends), ends
    assert {row[2] for row in lines(jobs, "b")} == {1, 2}
    assert {row[9] for row in lines(jobs, "b")} == {None}
