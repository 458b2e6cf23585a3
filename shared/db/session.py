"""Engines, sessions and the unit of work, for threads (psycopg, the worker) and for asyncio
(asyncpg, the API).

A session's type says in a signature whether a function writes: `ReadSession` runs each statement on
its own (no BEGIN, no COMMIT, two round trips fewer; behind PgBouncer it is a transaction of its
own), `WriteSession` is one transaction that the edge which opened it commits. Code that is handed a
session never commits.

    database = Database(settings.require_database_url())
    with database.write() as session:       # committed when the block ends, rolled back when it
                                            raises
        row = session.execute(repository.claim(...)).one_or_none()

The statements themselves are in `shared.jobs.repository` and `shared.serving`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from shared import tracing
from shared.db import faults
from shared.db.faults import is_outage as is_outage
from shared.db.faults import is_refusal as is_refusal
from shared.db.json_text import encode_json
from shared.db.url import DatabaseURL, parse_database_url

STATEMENT_TIMEOUT_MS = 30_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 60_000
# PgBouncer refuses them from a client; there they belong to the role (deploy/postgresql/roles.sql).
TIMEOUTS = {
    "statement_timeout": str(STATEMENT_TIMEOUT_MS),
    "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
}
# Unnamed statements, which live until the next one: in a transaction, PgBouncer keeps the session
# for it.
_UNPREPARED: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: "",
}
POOL_WAIT_S = 10
POOL_RECYCLE_S = 1800
# A server whose host vanished never answers; the kernel gives up after these seconds instead of
# hours.
KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def database_url(url: str, *, driver: str) -> URL:
    """Return the URL as SQLAlchemy takes it for `psycopg` or `asyncpg`. Raises ConfigurationError."""
    parsed = parse_database_url(url)
    return parsed.for_asyncpg() if driver == "asyncpg" else parsed.for_psycopg()


def sync_engine(url: str, *, pool_size: int = 5, max_overflow: int = 5, **options: Any) -> Engine:
    """An engine for threads, with timeouts that keep a sick database from holding them for ever."""
    parsed = parse_database_url(url)
    engine = create_engine(
        parsed.for_psycopg(),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_WAIT_S,
        pool_recycle=POOL_RECYCLE_S,
        pool_pre_ping=True,
        json_serializer=encode_json,
        connect_args={
            **_psycopg_arguments(parsed),
            **(
                {}
                if parsed.pgbouncer
                else {"options": " ".join(f"-c {k}={v}" for k, v in TIMEOUTS.items())}
            ),
            **KEEPALIVE,
        },
        **options,
    )
    faults.watch(engine)
    return engine


def sync_engine_unpooled(url: str) -> Engine:
    """An engine for one short piece of work (a migration): no pool to leave connections behind."""
    parsed = parse_database_url(url)
    return create_engine(
        parsed.for_psycopg(), poolclass=NullPool, connect_args=_psycopg_arguments(parsed)
    )


def _psycopg_arguments(parsed: DatabaseURL) -> dict[str, Any]:
    return {
        "connect_timeout": parsed.connect_timeout_seconds,
        "application_name": parsed.application_name,
        # A prepared statement belongs to a session of the server; PgBouncer may hand out another
        # one.
        **({"prepare_threshold": None} if parsed.pgbouncer else {}),
    }


def async_engine(
    url: str,
    *,
    pool_size: int = 10,
    max_overflow: int = 20,
    statement_timeout_ms: int = STATEMENT_TIMEOUT_MS,
    pool_wait_s: float = POOL_WAIT_S,
    **options: Any,
) -> AsyncEngine:
    """An engine for one event loop."""
    parsed = parse_database_url(url)
    engine = create_async_engine(
        parsed.for_asyncpg(),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=pool_wait_s,
        pool_recycle=POOL_RECYCLE_S,
        json_serializer=encode_json,
        connect_args={
            **parsed.asyncpg_dsn(),
            "timeout": parsed.connect_timeout_seconds,
            # The server's own timeout ends a slow statement; this one ends the wait for a server
            # that is gone.
            "command_timeout": statement_timeout_ms / 1000 + 5,
            "server_settings": {
                "application_name": parsed.application_name,
                **(
                    {}
                    if parsed.pgbouncer
                    else {**TIMEOUTS, "statement_timeout": str(statement_timeout_ms)}
                ),
            },
            **(_UNPREPARED if parsed.pgbouncer else {}),
        },
        **options,
    )
    # Instead of pool_pre_ping, which costs three round trips each time here: asyncpg hears at once
    # of a server that went.
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    faults.watch(engine.sync_engine)
    return engine


def _refuse_closed(connection: Any, record: Any, proxy: Any) -> None:
    """Have the pool replace a connection that the server has closed."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError("the server closed the connection")


class ReadSession(Session):
    """For statements that only read; each sees the newest committed state."""


class WriteSession(ReadSession):
    """One unit of work; whoever opened it commits."""


class AsyncReadSession(AsyncSession):
    """`ReadSession` for asyncio."""


class AsyncWriteSession(AsyncReadSession):
    """`WriteSession` for asyncio."""


class Database:
    """Sessions for threads."""

    def __init__(self, url: str, *, pool_size: int = 5, max_overflow: int = 5) -> None:
        self.engine = sync_engine(url, pool_size=pool_size, max_overflow=max_overflow)
        tracing.watch(self.engine)
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with ReadSession(self._autocommit, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[WriteSession]:
        with WriteSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def dispose(self) -> None:
        self.engine.dispose()


class AsyncDatabase:
    """Sessions for one event loop."""

    def __init__(
        self, url: str, *, pool_size: int = 10, max_overflow: int = 20, **options: Any
    ) -> None:
        self.engine = async_engine(url, pool_size=pool_size, max_overflow=max_overflow, **options)
        tracing.watch(self.engine.sync_engine)
        self._pgbouncer = parse_database_url(url).pgbouncer
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncReadSession]:
        if self._pgbouncer:
            # asyncpg prepares and executes in two steps, which need one session of the server.
            async with (
                AsyncReadSession(self.engine, expire_on_commit=False) as session,
                session.begin(),
            ):
                yield session
            return
        async with AsyncReadSession(self._autocommit, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncWriteSession]:
        async with (
            AsyncWriteSession(self.engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    async def dispose(self) -> None:
        await self.engine.dispose()
