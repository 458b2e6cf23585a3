"""Evaluations are stored piece by piece, tenants in turns, and are visible when they are whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import text

from shared.db.session import AsyncDatabase
from shared.evaluations import dataset_items, service
from shared.evaluations.requests import parse_evaluation
from shared.evaluations.sandbox_pool import SandboxPool
from shared.evaluations.service import EvaluationService, Made
from shared.files.service import FileService
from shared.files.store import DatabaseStore
from shared.ids import new_id
from shared.jobs.service import JobService
from shared.keys.principal import Principal
from shared.served_models import ServedModels
from shared.settings import load_settings
from shared.watch import JobWatch
from tests.integration.conftest import Jobs, register_tiny
from tests.integration.test_removals import maintenance

pytestmark = pytest.mark.integration

ITEMS = 60


class Killed(BaseException):
    """The end of the process."""


class WatchedStore(DatabaseStore):
    """The database as a store of files; `before` runs before each read of a file."""

    name = "watched"

    def __init__(self, database: AsyncDatabase) -> None:
        super().__init__(database)
        self.before: Callable[[str], Awaitable[None]] | None = None

    async def read(self, file_id: str, size: int) -> AsyncIterator[bytes]:
        if self.before is not None:
            await self.before(file_id)
        async for data in super().read(file_id, size):
            yield data


@dataclass
class Served:
    evaluations: EvaluationService
    files: FileService
    store: WatchedStore
    database: AsyncDatabase
    made: list[str] = field(default_factory=list)

    async def upload(self, tenant: str, mark: str) -> str:
        lines = [{"input": f"{mark} {n}", "reference": "2"} for n in range(ITEMS)]
        async with self.files.upload(tenant, purpose="evals") as made:
            await made.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            made.filename = "f"
        return str((await self.files.publish(made)).id)

    async def create(self, tenant: str, file_id: str) -> Made:
        new = parse_evaluation(
            {
                "dataset": {"file_id": file_id},
                "template": "{{input}}",
                "graders": [{"type": "exact"}],
                "configurations": [{"name": "a", "model": "vdiff-tiny", "max_tokens": 8}],
            },
            code_allowed=False,
        )
        return await self.evaluations.create(new, Principal(tenant, frozenset()), 3600)


@asynccontextmanager
async def serving(jobs: Jobs, **options: Any) -> AsyncIterator[Served]:
    async def nothing_over(job_ids: object) -> list[str]:
        return []

    register_tiny(jobs)
    database = AsyncDatabase(jobs.database_url, **options)
    client = redis.asyncio.Redis.from_url(jobs.redis_url)
    try:
        settings = load_settings({})
        jobs_service = JobService(
            database, client, ServedModels(database), JobWatch(client, nothing_over), settings
        )
        store = WatchedStore(database)
        files = FileService(database, store, max_bytes=1 << 20)
        evaluations = EvaluationService(
            database,
            jobs_service,
            files,
            {},
            settings,
            asyncio.Event(),
            SandboxPool(1, memory_mb=256),
        )
        yield Served(evaluations, files, store, database)
    finally:
        await client.aclose()
        await database.dispose()


def numbers(jobs: Jobs) -> tuple[int, int, int]:
    """(visible evaluations, hidden ones, items)."""
    row = jobs.execute(
        text(
            "SELECT count(*) FILTER (WHERE deleted_at IS NULL), count(*) FILTER (WHERE deleted_at IS NOT NULL), "
            "(SELECT count(*) FROM evaluation_items) FROM evaluations"
        )
    )[0]
    return int(row[0]), int(row[1]), int(row[2])


async def test_datasets_of_one_tenant_leave_turns_for_others(jobs: Jobs) -> None:
    """However many a tenant has read at once, and however slow its files are."""
    async with serving(jobs) as served:
        slow, go_on, begun = set(), asyncio.Event(), 0

        async def wait(file_id: str) -> None:
            nonlocal begun
            if file_id in slow:
                begun += 1
                await go_on.wait()

        served.store.before = wait
        slow |= {
            await served.upload("large", str(n)) for n in range(dataset_items.DATASETS_TOGETHER + 2)
        }
        other = await served.upload("small", "x")
        reads = [asyncio.create_task(served.create("large", file_id)) for file_id in slow]
        async with asyncio.timeout(60):
            while begun < dataset_items.DATASETS_TOGETHER - 1:
                await asyncio.sleep(0.01)
        assert (await served.create("small", other)).created
        assert begun == dataset_items.DATASETS_TOGETHER - 1 and not any(
            read.done() for read in reads
        )
        go_on.set()
        assert all([made.created for made in await asyncio.gather(*reads)])


async def test_no_transaction_is_open_while_a_dataset_is_read(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_items, "PIECE_BYTES", 500)  # many pieces
    async with serving(jobs, pool_size=1, max_overflow=0, pool_wait_s=1.0) as served:
        seen: list[int] = []
        file_id = await served.upload("t", "x")

        async def look(_: str) -> None:
            query = text(
                "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND "
                "state LIKE 'idle in transaction%'"
            )
            seen.append(jobs.execute(query)[0].n)

        served.store.before = look
        made = await served.create("t", file_id)
        assert (made.created, made.row.items, made.row.status) == (True, ITEMS, "in_progress")
        again = await served.create("t", file_id)
        assert (again.created, again.row.id, again.configurations[0]["reused"]) == (
            False,
            made.row.id,
            True,
        )
    assert seen == [0, 0, 0]  # two passes, and the first one of the second creation
    stored = jobs.execute(
        text("SELECT number, data->>'input' AS input FROM evaluation_items ORDER BY number")
    )
    assert [(row.number, row.input) for row in stored] == [(n + 1, f"x {n}") for n in range(ITEMS)]
    assert numbers(jobs) == (1, 0, ITEMS)


async def test_an_evaluation_is_visible_when_it_is_whole(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Housekeeping leaves one alone that is being stored, and removes one whose process died."""
    monkeypatch.setattr(dataset_items, "PIECE_BYTES", 500)
    async with serving(jobs) as served:
        file_id = await served.upload("t", "x")
        insert, pieces = service.repository.insert_items, 0

        def look(rows: Any) -> Any:
            nonlocal pieces
            pieces += 1
            maintenance(jobs).remove_deleted()
            if pieces == 3:
                raise Killed
            return insert(rows)

        async def do_nothing(_: str) -> None:
            """Do what a dead process does at its end."""

        with monkeypatch.context() as dying:
            dying.setattr(service.repository, "insert_items", look)
            dying.setattr(served.evaluations, "_discard", do_nothing)
            with pytest.raises(Killed):
                await served.create("t", file_id)
        visible, hidden, items = numbers(jobs)
        assert (visible, hidden) == (0, 1) and 0 < items < ITEMS
        assert await served.evaluations.page("t", after=None, limit=9) == ([], [])
        maintenance(jobs).remove_deleted()
        assert numbers(jobs) == (0, 1, items)  # its time is not over
        assert (await served.create("t", file_id)).created
        with jobs.database.write() as session:
            session.execute(
                text("UPDATE evaluations SET deleted_at = now() WHERE deleted_at IS NOT NULL")
            )
        maintenance(jobs).remove_deleted()
        assert numbers(jobs) == (1, 0, ITEMS)


async def test_what_is_refused_at_the_end_leaves_nothing(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(jobs) as served:
        file_id = await served.upload("t", "x")

        async def refuse(*of: Any, **more: Any) -> None:
            raise service.Conflict("full")

        with monkeypatch.context() as full:
            full.setattr(service, "refuse_beyond", refuse)
            with pytest.raises(service.Conflict, match="full"):
                await served.create("t", file_id)
        assert numbers(jobs)[:2] == (0, 1)
        maintenance(jobs).remove_deleted()
        assert numbers(jobs) == (0, 0, 0)


async def test_the_same_evaluation_twice_at_once_is_one(jobs: Jobs) -> None:
    """Also by two processes, whose requests do not wait for each other."""
    async with serving(jobs) as one, serving(jobs) as other:
        file_id = await one.upload("t", new_id("x"))
        passes = [0, 0]

        def meet(number: int) -> Callable[[str], Awaitable[None]]:
            async def wait(_: str) -> None:
                """Begin each pass when the other process does, so that both store the items."""
                passes[number] += 1
                async with asyncio.timeout(60):
                    while passes[1 - number] < passes[number]:
                        await asyncio.sleep(0.01)

            return wait

        one.store.before, other.store.before = meet(0), meet(1)
        made = await asyncio.gather(one.create("t", file_id), other.create("t", file_id))
    assert len({m.row.id for m in made}) == 1
    assert sorted(m.created for m in made) == [False, True]
    maintenance(jobs).remove_deleted()
    assert numbers(jobs) == (1, 0, ITEMS)
