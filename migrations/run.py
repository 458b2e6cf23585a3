"""Run migrations from code: `upgrade(url)`; nothing here needs an alembic.ini or a checkout.

Several processes may start at once, so a migrator first takes an advisory lock and the others wait
for it. A statement that cannot get its table lock gives up after `lock_timeout` instead of queueing
everybody else behind it. Each migration is a transaction of its own, so that one may build an index
without blocking writers (`migrations.online`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from migrations import grants, json_columns
from shared.db.session import sync_engine_unpooled
from shared.errors import ConfigurationError

LOCK_TIMEOUT_MS = 5_000
STATEMENT_TIMEOUT_MS = 300_000
JSON_REVISION, FIRST_CONVERTIBLE = "0020", "0017"
LOCK_WAIT_SECONDS = 3_600.0
LOCK_POLL_SECONDS = 0.1
MIGRATION_LOCK = 0x7644_6966  # any number that nothing else in the database uses ("vDif")


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration for the migrations beside this file."""
    cfg = Config()
    cfg.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    cfg.attributes["connection"] = connection
    return cfg


def head_revision() -> str:
    """The newest revision that this code knows."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    assert head is not None
    return head


def current_revision(database_url: str) -> str | None:
    """The revision that the database is at; None for an empty one."""
    with _connect(database_url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def is_current(database_url: str) -> bool:
    """Return whether the database is at the newest revision."""
    return current_revision(database_url) == head_revision()


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the database up to `revision` and grant the processes' roles what they need.

    Waits for another migrator to finish first.
    """
    with _migrator(database_url) as connection:
        if _has_rows_to_convert(connection, revision):
            _convert(database_url)
        connection.rollback()  # the look began a transaction, and each migration is one of its own
        command.upgrade(config(connection), revision)
        grants.grant(connection)
        connection.commit()


def downgrade(database_url: str, revision: str) -> None:
    """Take the database back to `revision` (`base` empties it)."""
    with _migrator(database_url) as connection:
        command.downgrade(config(connection), revision)


def _has_rows_to_convert(connection: Connection, target: str) -> bool:
    """Return whether the upgrade meets the jobs of a program that stored them as jsonb."""
    current = MigrationContext.configure(connection).get_current_revision()
    if current is None or current < FIRST_CONVERTIBLE:
        return False  # a new database, or a version from before the first release
    steps = ScriptDirectory.from_config(config()).iterate_revisions(target, current)
    return JSON_REVISION in {step.revision for step in steps}


def _convert(database_url: str) -> None:
    """Convert columns in short transactions, while old processes go on."""
    engine = sync_engine_unpooled(database_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"SET lock_timeout = {LOCK_TIMEOUT_MS}"))
        for table in (json_columns.ITEMS, json_columns.JOBS):
            json_columns.prepare(connection, table)


@contextmanager
def _connect(database_url: str) -> Iterator[Connection]:
    engine = sync_engine_unpooled(database_url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _migrator(database_url: str) -> Iterator[Connection]:
    """Yield a connection with timeouts, while another one holds the migration lock."""
    with _connect(database_url) as guard:
        _take_lock(guard.execution_options(isolation_level="AUTOCOMMIT"))
        with _connect(database_url) as connection:
            connection.execute(text(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}"))
            connection.execute(text(f"SET lock_timeout = {LOCK_TIMEOUT_MS}"))
            connection.commit()
            yield connection


def _take_lock(guard: Connection) -> None:
    """Ask for the session's lock until it is free; the connection's end frees it.

    Each try is a transaction of its own. One that waited, or stayed open, would keep a snapshot,
    and CREATE INDEX CONCURRENTLY waits for every older snapshot.

    Raises:
        ConfigurationError: another migrator holds it for too long.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while not guard.execute(
        text("SELECT pg_try_advisory_lock(:key)"), {"key": MIGRATION_LOCK}
    ).scalar_one():
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"another migration has run for {LOCK_WAIT_SECONDS:g} seconds; try again later"
            )
        time.sleep(LOCK_POLL_SECONDS)


def require_current(database_url: str) -> None:
    """Raises ConfigurationError when the database is away or not migrated."""
    try:
        current = is_current(database_url)
    except OperationalError as exc:
        reason = str(exc.orig).strip().splitlines()[0]
        raise ConfigurationError(
            f"cannot reach PostgreSQL: {reason}", param="database_url"
        ) from exc
    if not current:
        raise ConfigurationError(
            "the database is not migrated to this version; run `vdiff migrate`"
        )
