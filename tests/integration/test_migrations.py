"""Migrations on a real PostgreSQL: they build what the models say, go down and up, and two
migrators do not race.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

import shared.db.tables  # noqa: F401
from migrations import run
from shared import counts
from shared.db.base import Base
from shared.db.session import AsyncDatabase, sync_engine_unpooled
from tests.integration.conftest import Jobs, create_database, drop_database, eventually

pytestmark = pytest.mark.integration

BEFORE_INDEXES, INDEXES, COUNTS = (
    "0021",
    "0022",
    "0023",
)  # revisions around those that change large tables

CATALOG = {
    "columns": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
               pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
          AND c.relname <> 'alembic_version'""",
    "constraints": """
        SELECT c.relname, k.conname, pg_get_constraintdef(k.oid)
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relname <> 'alembic_version'""",
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'alembic_version'""",
}


def catalog(url: str) -> dict[str, list[tuple[object, ...]]]:
    with sync_engine_unpooled(url).connect() as connection:
        return {
            name: sorted((tuple(row) for row in connection.execute(text(query))), key=repr)
            for name, query in CATALOG.items()
        }


@pytest.fixture
def created_url(postgres_url: str) -> Iterator[str]:
    url = create_database(postgres_url, "vdiff_created")
    with sync_engine_unpooled(url).begin() as connection:
        Base.metadata.create_all(connection)
    yield url
    drop_database(postgres_url, "vdiff_created")


def test_migrated_schema_equals_the_models(empty_database_url: str, created_url: str) -> None:
    run.upgrade(empty_database_url)
    assert catalog(empty_database_url) == catalog(created_url)
    with sync_engine_unpooled(empty_database_url).connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_upgrade_downgrade_upgrade(empty_database_url: str) -> None:
    assert run.current_revision(empty_database_url) is None
    run.upgrade(empty_database_url)
    assert run.is_current(empty_database_url)
    before = catalog(empty_database_url)
    run.downgrade(empty_database_url, "base")
    assert catalog(empty_database_url) == {"columns": [], "constraints": [], "indexes": []}
    assert not run.is_current(empty_database_url)
    run.upgrade(empty_database_url)
    assert catalog(empty_database_url) == before


def test_two_migrators_at_once_both_succeed(empty_database_url: str) -> None:
    errors: list[BaseException] = []

    def migrate() -> None:
        try:
            run.upgrade(empty_database_url)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert run.is_current(empty_database_url)


@pytest.mark.parametrize(
    "broken",
    [
        "status = 'done'",
        "status = 'running'",
        "lease_until = now()",
        "worker_id = 'w'",
        "status = 'succeeded', finished_at = now()",
        "status = 'failed', finished_at = now()",
        "status = 'cancelled'",
        "finished_at = now()",
        "result = '{}'",
        "failures = 4",
        "priority = 'urgent'",
    ],
)
def test_the_schema_refuses_impossible_rows(jobs: Jobs, broken: str) -> None:
    job_id = jobs.submit(push=0)
    with pytest.raises(IntegrityError), jobs.database.write() as session:
        session.execute(text(f"UPDATE jobs SET {broken} WHERE id = :id"), {"id": job_id})


def test_a_migration_has_timeouts(empty_database_url: str) -> None:
    with run._migrator(empty_database_url) as connection:
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("lock_timeout", "statement_timeout")
        ]
    assert shown == ["5s", "5min"]


def test_a_migration_does_not_queue_behind_a_lock(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that somebody holds: the migration gives up instead of making everybody else wait
    behind it.
    """
    monkeypatch.setattr(run, "LOCK_TIMEOUT_MS", 50)
    with jobs.database.write() as session:
        session.execute(text("LOCK TABLE jobs IN ACCESS SHARE MODE"))
        with pytest.raises(OperationalError, match="lock timeout"):
            run.downgrade(jobs.database_url, "base")
    # The migration that met the lock was undone; those before it stay, and the next try goes on
    # from there.
    assert run.current_revision(jobs.database_url) is not None
    assert {"lanes_insert", "ix_jobs_lease"} <= _names(jobs)
    run.upgrade(jobs.database_url)
    assert run.is_current(jobs.database_url)


def _names(jobs: Jobs) -> set[str]:
    """Triggers and indexes of the table of jobs."""
    with jobs.database.read() as session:
        statement = text(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'jobs'::regclass UNION ALL "
            "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'jobs'::regclass"
        )
        return set(session.execute(statement).scalars())


def test_indexes_are_built_beside_writers(jobs: Jobs) -> None:
    """A transaction that writes to the table stays open meanwhile; with a lock of the table the
    migration would give up.
    """
    run.downgrade(jobs.database_url, BEFORE_INDEXES)
    outcome: list[BaseException | None] = []

    def upgrade() -> None:
        try:
            run.upgrade(jobs.database_url, INDEXES)
            outcome.append(None)
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=upgrade)
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET model = 'x'"))
        thread.start()
        building = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
            "AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
        )

        def is_building() -> bool:
            with jobs.database.read() as other:
                return bool(other.execute(text(building)).scalar_one())

        eventually(is_building, what="the index is being built")
        jobs.submit(push=0)  # another writer does not wait for it
    thread.join(60)
    assert outcome == [None]
    assert "ix_jobs_tenant_model_status_id" in _names(jobs)


def test_an_index_of_an_interrupted_migration_is_built_again(jobs: Jobs) -> None:
    run.downgrade(jobs.database_url, BEFORE_INDEXES)
    with jobs.database.write() as session:
        session.execute(text("CREATE INDEX ix_jobs_tenant_model_status_id ON jobs (id)"))
        session.execute(
            text(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_jobs_tenant_model_status_id'::regclass"
            )
        )
    run.upgrade(jobs.database_url)
    with jobs.database.read() as session:
        statement = text(
            "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_jobs_tenant_model_status_id'"
        )
        assert "(tenant, model, status, id)" in session.execute(statement).scalar_one()


def test_counts_know_what_was_there_before(jobs: Jobs) -> None:
    """Rows of the former schema, and a move between the revision that makes the triggers and the
    one that counts.
    """
    run.downgrade(jobs.database_url, INDEXES)
    ids = [jobs.submit(push=0) for _ in range(4)]
    end = text("UPDATE jobs SET status = 'cancelled', finished_at = now() WHERE id = ANY(:ids)")
    with jobs.database.write() as session:
        session.execute(end, {"ids": ids[:2]})
    run.upgrade(jobs.database_url, COUNTS)
    with jobs.database.write() as session:
        session.execute(end, {"ids": ids[2:3]})
        session.execute(counts.roll_up())
    run.upgrade(jobs.database_url)
    with jobs.database.read() as session:
        found = {
            row.status: row.count for row in session.execute(counts.jobs_by_status()) if row.count
        }
    assert found == {"cancelled": 3, "queued": 1}


def test_connections_have_timeouts(jobs: Jobs) -> None:
    names = ("statement_timeout", "idle_in_transaction_session_timeout")

    async def of_the_api() -> list[str]:
        database = AsyncDatabase(jobs.database_url)
        try:
            async with database.read() as session:
                return [
                    (await session.execute(text(f"SHOW {name}"))).scalar_one() for name in names
                ]
        finally:
            await database.dispose()

    with jobs.database.read() as session:
        of_the_worker = [session.execute(text(f"SHOW {name}")).scalar_one() for name in names]
    assert of_the_worker == asyncio.run(of_the_api()) == ["30s", "1min"]


def test_every_revision_goes_down_and_up_alone(empty_database_url: str) -> None:
    run.upgrade(empty_database_url)
    newest = catalog(empty_database_url)
    revisions = [r.revision for r in ScriptDirectory.from_config(run.config()).walk_revisions()]
    for revision in revisions[1:]:
        run.downgrade(empty_database_url, revision)
        assert run.current_revision(empty_database_url) == revision
    for revision in revisions[1:-1][::-1]:
        run.upgrade(empty_database_url, revision)
    run.upgrade(empty_database_url)
    assert catalog(empty_database_url) == newest


def test_inline_results_are_switched_off_where_a_key_without_jobs_may_have_set_them(
    empty_database_url: str,
) -> None:
    run.upgrade(empty_database_url, "0017")
    key = (
        "INSERT INTO api_keys (id, tenant, name, key_hash, scopes, webhook_secret, revoked_at) "
        "VALUES (:id, :tenant, 'n', 'h', :scopes, 's', CASE WHEN :revoked THEN now() END)"
    )
    endpoint = (
        "INSERT INTO webhook_endpoints (id, tenant, url, events, inline_result, secret) "
        "VALUES (:tenant, :tenant, 'https://x.example', '{job.succeeded}', true, 's')"
    )
    keys = {
        "narrow": (["webhooks"], False),
        "wide": (["jobs", "webhooks"], False),
        "gone": (["webhooks"], True),
        "admin": (["admin", "webhooks"], False),
        "none": (["jobs"], False),
    }
    with sync_engine_unpooled(empty_database_url).begin() as connection:
        for tenant, (scopes, revoked) in keys.items():
            values = {"id": f"key_{tenant}", "tenant": tenant, "scopes": scopes, "revoked": revoked}
            connection.execute(text(key), values)
            connection.execute(text(endpoint), {"tenant": tenant})
    run.upgrade(empty_database_url)
    with sync_engine_unpooled(empty_database_url).connect() as connection:
        found = connection.execute(
            text("SELECT id FROM webhook_endpoints WHERE NOT inline_result")
        ).scalars()
        assert list(found) == ["narrow"]


def test_a_database_that_is_away_is_named(postgres_url: str) -> None:
    from shared.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="cannot reach PostgreSQL"):
        run.require_current("postgresql://nobody@127.0.0.1:1/none")


def test_a_database_that_is_not_migrated_is_named(empty_database_url: str) -> None:
    from shared.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="vdiff migrate"):
        run.require_current(empty_database_url)
