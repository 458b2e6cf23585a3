"""Lists on a ledger with many rows: no filter reads more of it than a window, and the rows are the
right ones.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from shared import counts
from shared.db.explain import explain
from shared.db.lists import ListsBusy, ListsDatabase, ListTimeout
from shared.db.session import AsyncDatabase
from shared.jobs import listing
from shared.jobs.listing import JobFilter, read_page
from shared.usage import repository as usage
from shared.webhooks import repository as webhooks
from tests.integration.conftest import Jobs, jobs_with_database

pytestmark = pytest.mark.integration
NOW = datetime(2026, 1, 31, tzinfo=UTC)
ROWS = 24_000  # ten seconds apart, half of them the tenant's
WINDOW, PAGE = 200, 20
# `failed` is rare, model `b` is rare, their combination has two rows; batch-1 has 100; one label is
# everywhere, one rare.
FILL = """
INSERT INTO jobs (id, tenant, endpoint, model, status, batch_id, batch_line, metadata, body, params, prompt_token_ids,
                  created_at, queued_at, finished_at, result, error)
SELECT 'job_' || ms || lpad(n::text, 16, '0'), tenant, '/v1/completions',
       CASE WHEN n % 100 = 0 THEN 'b' ELSE 'a' END, status,
       CASE WHEN n % 240 = 2 THEN 'batch_1' END, CASE WHEN n % 240 = 2 THEN n END,
       CASE WHEN n = 400 THEN '{"env": "prod", "order": "17"}' WHEN n % 10 = 9 THEN '{}' ELSE '{"env": "prod"}' END::jsonb,
       '{}', '{}', '{1}', at, at, at,
       CASE WHEN status = 'succeeded' THEN '{}'::jsonb END, CASE WHEN status = 'failed' THEN '{"code": "x"}'::jsonb END
FROM (
    SELECT n, at, CASE WHEN n % 2 = 0 THEN 'mine' ELSE 'other' END AS tenant,
           CASE WHEN n % 500 = 0 THEN 'failed' ELSE 'succeeded' END AS status,
           (SELECT string_agg(substr('0123456789abcdefghjkmnpqrstvwxyz', 1 + ((ms >> (5 * i)) & 31)::int, 1), ''
                              ORDER BY i DESC) FROM generate_series(0, 9) AS i) AS ms
    FROM (SELECT n, at, (extract(epoch FROM at) * 1000)::bigint AS ms FROM (
        SELECT n, CAST(:now AS timestamptz) - make_interval(secs => 10 * (:rows - n)) AS at
        FROM generate_series(1, :rows) AS n) AS dated) AS timed
) AS made
"""


@pytest.fixture(scope="module")
def ledger(postgres_url: str, redis_url: str, migrated_template: str) -> Iterator[Jobs]:
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        with jobs.database.write() as session:
            session.execute(text(FILL), {"rows": ROWS, "now": NOW})
            session.execute(
                text(
                    "INSERT INTO webhook_endpoints (id, tenant, url, events, secret) "
                    "SELECT 'we_' || i, 'mine', 'https://x', '{}', 's' FROM generate_series(1, 2) i"
                )
            )
            session.execute(
                text(
                    "INSERT INTO webhook_events (id, tenant, type, job_id, sequence) "
                    "SELECT 'evt_' || i, 'mine', 'job.succeeded', 'job_' || i, 1 FROM generate_series(1, 10000) i"
                )
            )
            session.execute(
                text(
                    "INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id, status) SELECT 'evt_' || i, 'mine', "
                    "'we_' || (1 + i % 2), CASE WHEN i % 1000 = 0 THEN 'failed' ELSE 'delivered' END "
                    "FROM generate_series(1, 10000) i"
                )
            )
            for table in ("jobs", "webhook_deliveries", "webhook_events"):
                session.execute(text(f"ANALYZE {table}"))
        yield jobs


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "WINDOW", WINDOW)


def looked_at(jobs: Jobs, statement: Any) -> int:
    """Execute a statement; return how many entries of tables and indexes it read. No table is read
    from end to end.
    """
    with jobs.database.write() as session:
        ((plan,),) = explain(session, statement, "ANALYZE, FORMAT JSON, TIMING OFF")
    total = 0
    todo = [plan["Plan"]]
    while todo:
        node = todo.pop()
        todo += node.get("Plans", [])
        if node["Node Type"] == "Seq Scan":
            assert node["Relation Name"] not in ("jobs", "webhook_deliveries", "webhook_events"), (
                node
            )
        if "Scan" in node["Node Type"]:
            removed = node.get("Rows Removed by Filter", 0) + node.get(
                "Rows Removed by Index Recheck", 0
            )
            total += int((node["Actual Rows"] + removed) * node["Actual Loops"])
    return total


FILTERS: list[dict[str, Any]] = [
    {"status": "failed"},
    {"model": "b"},
    {"model": "a"},
    {"batch_id": "batch_1"},
    {"metadata": {"order": "17"}},
    {"metadata": {"env": "prod"}},
    {"created_after": NOW - timedelta(hours=1)},
    {"created_after": NOW},
]


def combinations() -> list[dict[str, Any]]:
    made = [{}]
    for size in (1, 2, 3):
        for some in itertools.combinations(FILTERS, size):
            names = [name for one in some for name in one]
            if len(set(names)) == len(names):
                made.append({name: value for one in some for name, value in one.items()})
    return made


@pytest.mark.parametrize("cursor", [False, True])
def test_no_filter_reads_more_than_a_window(ledger: Jobs, cursor: bool) -> None:
    with ledger.database.read() as session:
        middle = session.execute(
            text("SELECT id FROM jobs ORDER BY id OFFSET 12000 LIMIT 1")
        ).scalar_one()
    for given in combinations():
        wanted = JobFilter("mine", **given, before_id=middle if cursor else None)
        # The window's ids, the same rows by their key, and up to six states merged.
        assert looked_at(ledger, listing.of_window(wanted, PAGE + 1)) <= 5 * WINDOW, given
        assert looked_at(ledger, listing.end_of_window(wanted)) <= 3 * WINDOW, given
    rare = JobFilter("mine", metadata={"order": "17"})
    assert looked_at(ledger, listing.of_rare_metadata(rare, PAGE + 1)) <= 10


async def pages(jobs: Jobs, wanted: JobFilter) -> tuple[list[str], int]:
    """All ids that a list gives, and how many pages that takes."""
    database = ListsDatabase(jobs.database_url)
    found: list[str] = []
    count = 0
    try:
        while True:
            page = await read_page(database, wanted, PAGE)
            found += [row.id for row in page.rows]
            count += 1
            assert count < 2_000
            if page.next_id is None:
                return found, count
            wanted = JobFilter(
                wanted.tenant,
                wanted.status,
                wanted.model,
                wanted.batch_id,
                wanted.metadata,
                wanted.created_after,
                page.next_id,
            )
    finally:
        await database.dispose()


SQL = {
    "status": "status = :status",
    "model": "model = :model",
    "batch_id": "batch_id = :batch_id",
    "metadata": "metadata @> CAST(:metadata AS jsonb)",
    "created_after": "created_at > :created_after",
}
SHORT = [
    {"status": "failed"},
    {"model": "b"},
    {"batch_id": "batch_1"},
    {"created_after": NOW - timedelta(hours=1)},
    {"metadata": {"order": "17"}},
    {"model": "b", "status": "failed"},
    {"model": "a", "created_after": NOW - timedelta(hours=30), "metadata": {"order": "17"}},
    {"batch_id": "batch_1", "model": "a", "status": "succeeded"},
    {"status": "failed", "metadata": {"env": "prod"}},
    {"metadata": {"env": "dev"}},
]


@pytest.mark.parametrize("given", SHORT, ids=str)
async def test_pages_hold_what_a_scan_would_find(ledger: Jobs, given: dict[str, Any]) -> None:
    found, count = await pages(ledger, JobFilter("mine", **given))
    where = " AND ".join(SQL[name] for name in given)
    values = {k: str(v).replace("'", '"') if k == "metadata" else v for k, v in given.items()}
    with ledger.database.read() as session:
        statement = text(f"SELECT id FROM jobs WHERE tenant = 'mine' AND {where} ORDER BY id DESC")
        expected = list(session.execute(statement, values).scalars())
    assert found == expected
    # A label that is rare is found by its own index, not by paging through the ledger.
    assert count <= len(expected) / PAGE + (ROWS / 2 / WINDOW if "created_after" in given else 2)


def test_no_list_of_deliveries_reads_more_than_its_page(ledger: Jobs) -> None:
    some: list[dict[str, Any]] = [
        {},
        {"endpoint_id": "we_1"},
        {"status": "failed"},
        {"job_id": "job_77"},
        {"endpoint_id": "we_2", "status": "failed"},
        {"status": "pending"},
    ]
    for given in some:
        query = {"endpoint_id": None, "job_id": None, "status": None, **given}
        for before in (None, 5_000):
            statement = webhooks.list_deliveries("mine", before=before, limit=PAGE, **query)
            assert looked_at(ledger, statement) <= 6 * (PAGE + 1), (given, before)


def test_counts_by_state_are_kept_and_not_counted(ledger: Jobs) -> None:
    with ledger.database.write() as session:
        session.execute(counts.roll_up())
        expected = dict(
            session.execute(text("SELECT status, count(*) FROM jobs GROUP BY status")).all()
        )
        mine = dict(
            session.execute(
                text("SELECT status, count(*) FROM jobs WHERE tenant = 'mine' GROUP BY status")
            ).all()
        )
        for tenant, wanted in ((None, expected), ("mine", mine)):
            found = {
                row.status: row.count
                for row in session.execute(counts.jobs_by_status(tenant))
                if row.count
            }
            assert found == wanted
    assert looked_at(ledger, counts.jobs_by_status()) <= 20
    assert looked_at(ledger, counts.by_status("file")) <= 20


def test_counts_follow_every_move(jobs: Jobs) -> None:
    def found() -> dict[str, int]:
        with jobs.database.read() as session:
            return {
                row.status: row.count
                for row in session.execute(counts.jobs_by_status())
                if row.count
            }

    ids = [jobs.submit(push=0) for _ in range(5)]
    assert found() == {"queued": 5}
    moves = [
        ("status = 'running', lease_until = now(), worker_id = 'w'", {"queued": 4, "running": 1}),
        (
            "status = 'cancelled', finished_at = now(), lease_until = NULL, worker_id = NULL",
            {"queued": 4, "cancelled": 1},
        ),
        ("status = 'queued', finished_at = NULL", {"queued": 5}),
        ("status = 'expired', finished_at = now()", {"queued": 4, "expired": 1}),
    ]
    for change, expected in moves:
        with jobs.database.write() as session:
            session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": ids[0]})
        assert found() == expected
        with jobs.database.write() as session:
            session.execute(counts.roll_up())
        assert found() == expected
    with jobs.database.write() as session:
        session.execute(text("DELETE FROM jobs WHERE id = ANY(:ids)"), {"ids": ids[:2]})
    assert found() == {"queued": 3}


async def test_lists_that_take_long_say_so_and_leave_submissions_alone(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.db.lists.STATEMENT_TIMEOUT_MS", 2_000)
    monkeypatch.setattr("shared.db.lists.WAIT_SECONDS", 0.1)
    lists, database = (
        ListsDatabase(jobs.database_url),
        AsyncDatabase(jobs.database_url, pool_size=1, max_overflow=0),
    )

    async def slow() -> None:
        async with lists.read() as session:
            await session.execute(text("SELECT pg_sleep(60)"))

    try:
        outcomes = await asyncio.gather(*(slow() for _ in range(12)), return_exceptions=True)
        kinds = {type(outcome) for outcome in outcomes}
        assert kinds == {ListTimeout, ListsBusy}
        assert [type(outcome) for outcome in outcomes].count(ListTimeout) == 4
        running = [asyncio.create_task(slow()) for _ in range(12)]
        async with (
            database.write() as session
        ):  # one connection of its own is enough while lists are stuck
            assert (await session.execute(text("SELECT 1"))).scalar_one() == 1
        await asyncio.gather(*running, return_exceptions=True)
    finally:
        await lists.dispose()
        await database.dispose()


def test_usage_of_all_tenants_reads_its_days_alone(jobs: Jobs) -> None:
    with jobs.database.write() as session:
        session.execute(
            text(
                "INSERT INTO usage (tenant, day, key_id, model) SELECT 't' || t, date '2025-01-01' + d, '', 'm' "
                "FROM generate_series(1, 40) t, generate_series(1, 360) d"
            )
        )
        session.execute(text("ANALYZE usage"))
    first = datetime(2025, 5, 1, tzinfo=UTC).date()
    assert (
        looked_at(jobs, usage.used(None, first=first, last=first)) <= 90
    )  # once in the index, once in the table
    assert looked_at(jobs, usage.used("t7", first=first, last=first + timedelta(9))) <= 25
