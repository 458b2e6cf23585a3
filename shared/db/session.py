"""Engines, sessions and the unit of work, for threads (psycopg, the worker) and for asyncio (asyncpg, the API).

A session's type says in a signature whether a function writes: `ReadSession` runs each statement on its own (no
BEGIN, no COMMIT, two round trips fewer), `WriteSession` is one transaction that the edge which opened it commits.
Code that is handed a session never commits.

    database = Database(settings.require_database_url())
    with database.write() as session:       # committed when the block ends, rolled back when it raises
        row = session.execute(repository.claim(...)).one_or_none()

The statements themselves are in `shared.jobs.repository` and `shared.serving`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from shared import tracing
from shared.db import faults
from shared.db.faults import is_outage as is_outage
from shared.db.faults import is_refusal as is_refusal
from shared.errors import ConfigurationError

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
IDLE_IN_TRANSACTION_TIMEOUT_MS = 60_000
POOL_WAIT_S = 10
POOL_RECYCLE_S = 1800
# A server whose host vanished never answers; the kernel gives up after these seconds instead of hours.
KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}


# libpq's, which both drivers understand; each of the others would stop one of the processes and not the rest.
TLS_OPTIONS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword")
URL_OPTIONS = (*TLS_OPTIONS, "host", "port", "target_session_attrs")


def database_url(url: str, *, driver: str) -> URL:
    """`postgresql://...` (or `postgres://`) with SQLAlchemy's driver put in.

    Raises:
        ConfigurationError: not a PostgreSQL URL, or with an option that not every process could use.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as exc:
        raise ConfigurationError("VDIFF_DATABASE_URL is not a URL", param="database_url") from exc
    if parsed.drivername.partition("+")[0] not in ("postgresql", "postgres"):
        raise ConfigurationError("VDIFF_DATABASE_URL must start with postgresql://", param="database_url")
    if unknown := [name for name in parsed.query if name not in URL_OPTIONS]:
        message = f"VDIFF_DATABASE_URL: the option {unknown[0]} cannot be used; there are {', '.join(URL_OPTIONS)}"
        raise ConfigurationError(message, param="database_url")
    return parsed.set(drivername=f"postgresql+{driver}")


def sync_engine(url: str, *, pool_size: int = 5, max_overflow: int = 5, **options: Any) -> Engine:
    """An engine for threads, with timeouts that keep a sick database from holding them for ever."""
    engine = create_engine(
        database_url(url, driver="psycopg"),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_WAIT_S,
        pool_recycle=POOL_RECYCLE_S,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "vdiff",
            "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} "
            f"-c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_MS}",
            **KEEPALIVE,
        },
        **options,
    )
    faults.watch(engine)
    return engine


def sync_engine_unpooled(url: str) -> Engine:
    """An engine for one short piece of work (a migration): no pool to leave connections behind."""
    return create_engine(
        database_url(url, driver="psycopg"), poolclass=NullPool, connect_args={"connect_timeout": CONNECT_TIMEOUT_S}
    )


def async_engine(url: str, *, pool_size: int = 10, max_overflow: int = 20, **options: Any) -> AsyncEngine:
    """An engine for one event loop."""
    parsed = database_url(url, driver="asyncpg")
    # asyncpg reads libpq's TLS options from a DSN only, and SQLAlchemy would hand them over as arguments, which it refuses.
    tls = {name: str(value) for name, value in parsed.query.items() if name in TLS_OPTIONS}
    engine = create_async_engine(
        parsed.difference_update_query(tls),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_WAIT_S,
        pool_recycle=POOL_RECYCLE_S,
        connect_args={
            **({"dsn": f"postgresql:///?{urlencode(tls)}"} if tls else {}),
            "timeout": CONNECT_TIMEOUT_S,
            # The server's own timeout ends a slow statement; this one ends the wait for a server that is gone.
            "command_timeout": STATEMENT_TIMEOUT_MS / 1000 + 5,
            "server_settings": {
                "application_name": "vdiff",
                "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
            },
        },
        **options,
    )
    # Instead of pool_pre_ping, which costs three round trips each time here: asyncpg hears at once of a server that went.
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

    def __init__(self, url: str, *, pool_size: int = 10, max_overflow: int = 20) -> None:
        self.engine = async_engine(url, pool_size=pool_size, max_overflow=max_overflow)
        tracing.watch(self.engine.sync_engine)
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncReadSession]:
        async with AsyncReadSession(self._autocommit, expire_on_commit=False) as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncWriteSession]:
        async with AsyncWriteSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    async def dispose(self) -> None:
        await self.engine.dispose()
