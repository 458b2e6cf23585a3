"""Connections of their own for lists and reports: few, and with a short time for each statement.

A list that takes long ends with an error that says so, and however many are asked for at once,
submissions find a connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.db.session import AsyncDatabase, AsyncReadSession, AsyncWriteSession
from shared.errors import VDiffError

CONNECTIONS = 4  # of one API process
STATEMENT_TIMEOUT_MS = 5_000
WAIT_SECONDS = 2.0  # for a connection
QUERY_CANCELED = "57014"  # PostgreSQL's statement_timeout


class ListTimeout(VDiffError):
    """One statement of a list took too long."""

    code = "list_timeout"
    http_status = 504
    retryable = True


class ListsBusy(VDiffError):
    """Every connection for lists is in use."""

    code = "lists_busy"
    http_status = 503
    retryable = True


def is_canceled(exc: Exception) -> bool:
    """Return whether a statement ended because its time was over."""
    return isinstance(exc, DBAPIError) and getattr(exc.orig, "sqlstate", None) == QUERY_CANCELED


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as exc:
        message = f"{CONNECTIONS} other lists or reports are being read; try again"
        raise ListsBusy(message) from exc
    except DBAPIError as exc:
        if not is_canceled(exc):
            raise
        seconds = STATEMENT_TIMEOUT_MS / 1000
        message = f"the list or report was not ready after {seconds:g} seconds; ask for less: a filter, a shorter time"
        raise ListTimeout(message) from exc


class ListsDatabase(AsyncDatabase):
    """Sessions of lists and reports. Each raises ListTimeout and ListsBusy."""

    def __init__(self, url: str) -> None:
        super().__init__(
            url,
            pool_size=CONNECTIONS,
            max_overflow=0,
            statement_timeout_ms=STATEMENT_TIMEOUT_MS,
            pool_wait_s=WAIT_SECONDS,
        )

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncReadSession]:
        with _said():
            async with super().read() as session:
                if self._pgbouncer:  # which takes no timeout when it connects
                    await session.execute(
                        text(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}")
                    )
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncWriteSession]:
        with _said():
            async with super().write() as session:
                yield session
