"""Backup and restore as docs/operations.md has it: dump while it runs, lose everything, restore, go
on.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from shared import counts
from shared.db.session import AsyncDatabase, Database
from shared.jobs.listing import JobFilter, Page, read_page
from shared.jobs.status import JobStatus
from tests.integration.conftest import (
    Jobs,
    WorkerProcess,
    create_database,
    drop_database,
    eventually,
)
from vdiff.embedded import postgres

pytestmark = pytest.mark.integration


def tool(name: str, *args: object) -> None:
    done = subprocess.run(
        [postgres._binaries() / name, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_dump_lose_everything_restore_go_on(
    jobs: Jobs, postgres_url: str, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    first = start_worker().wait_ready()
    finished = [jobs.submit(seed=i) for i in range(3)]
    results = {job_id: jobs.wait_done(job_id).result for job_id in finished}
    running = jobs.submit(slow=True)
    jobs.wait_status(running, JobStatus.RUNNING)
    waiting = [jobs.submit(push=0) for _ in range(3)]

    dump = tmp_path / "vdiff.dump"
    tool("pg_dump", "--format=custom", f"--file={dump}", jobs.database_url)
    lost = jobs.submit(
        push=0
    )  # accepted after the dump: the price of a backup without WAL archiving

    first.end()
    jobs.database.dispose()
    jobs.redis.flushdb()
    name = jobs.database_url.rsplit("/", 1)[1]
    drop_database(postgres_url, name)
    create_database(postgres_url, name)
    tool("pg_restore", "--no-owner", f"--dbname={jobs.database_url}", dump)
    jobs.database = Database(jobs.database_url)

    with jobs.database.read() as session:
        rows = {row.id: row for row in session.execute(text("SELECT id, status, result FROM jobs"))}
    assert set(rows) == {*finished, running, *waiting} and lost not in rows
    assert {job_id: rows[job_id].result for job_id in finished} == results
    assert rows[running].status == "running"  # by a worker that is gone: its lease runs out

    start_worker().wait_ready()
    for job_id in waiting:
        assert jobs.wait_done(job_id, seconds=60).status == JobStatus.SUCCEEDED
    eventually(
        lambda: jobs.row(running).attempt == 2, seconds=60, what="the next attempt of what ran"
    )
    jobs.execute(
        text("UPDATE jobs SET cancel_requested = true WHERE id = :id RETURNING id").bindparams(
            id=running
        )
    )
    jobs.wait_done(running, seconds=60)
    assert {job_id: jobs.row(job_id).result for job_id in finished} == results


def test_a_hundred_thousand_jobs_are_looked_at_in_pages(jobs: Jobs) -> None:
    """Read one page and the counts of a long ledger by index."""
    jobs.execute(
        text(
            "INSERT INTO jobs (id, endpoint, model, body, params, prompt_token_ids, status, finished_at, result)"
            " SELECT 'job_' || lpad(i::text, 26, '0'), '/v1/completions', 'm', '{}', '{}', '{}', 'succeeded', now(), '{}'"
            " FROM generate_series(1, 100000) AS i RETURNING id"
        )
    )
    with jobs.database.write() as session:
        session.execute(text("ANALYZE jobs"))

    async def first_page() -> Page:
        database = AsyncDatabase(jobs.database_url)
        try:
            return await read_page(database, JobFilter("anonymous"), 25)
        finally:
            await database.dispose()

    page = asyncio.run(first_page())
    newest = [f"job_{i:026d}" for i in range(100_000, 99_975, -1)]
    assert [row.id for row in page.rows] == newest and page.next_id == newest[-1]
    with jobs.database.read() as session:
        counted = {
            row.status: row.count
            for row in session.execute(counts.jobs_by_status("anonymous"))
            if row.count
        }
        assert counted == {"succeeded": 100_000}
        plan = "\n".join(
            row[0]
            for row in session.execute(
                text(
                    "EXPLAIN SELECT id FROM jobs WHERE tenant = 'anonymous' ORDER BY id DESC LIMIT 26"
                )
            )
        )
    assert "Index" in plan and "Seq Scan" not in plan and "Sort" not in plan
