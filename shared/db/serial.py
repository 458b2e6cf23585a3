"""Transactions that take an advisory lock: of each lock, one at a time in a process.

A transaction that waits for an advisory lock keeps its connection. Without this module, the
requests of one key could wait with every connection of the pool, and the requests of other keys
would find none. `SerialWrites` makes them wait before they take a connection, and `lock` bounds the
wait for the lock itself.

    async with writes.write(("tenant", "key")) as session:
        await session.execute(select(*lock("queue tenant key")))

Do not open another transaction of the same name, or wait for one, while you hold a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import ColumnElement, func
from sqlalchemy.exc import DBAPIError

from shared.db.faults import sqlstate
from shared.db.session import AsyncDatabase, AsyncWriteSession
from shared.errors import VDiffError

TURN_SECONDS = 10.0  # that a request waits for the others of its process
LOCK_TIMEOUT_MS = 5_000  # that a transaction waits for a lock
LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL's lock_timeout


class LockTimeout(VDiffError):
    """Another transaction held a lock for too long. Nothing was stored."""

    code = "lock_timeout"
    http_status = 503
    retryable = True


def lock(name: str) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    """Return what a SELECT takes to wait for the advisory lock `name` and to hold it until COMMIT.

    PostgreSQL evaluates the columns in their order. The timeout applies to the rest of the
    transaction too.
    """
    return (
        func.set_config("lock_timeout", str(LOCK_TIMEOUT_MS), True),
        func.pg_advisory_xact_lock(func.hashtextextended(name, 0)),
    )


class _Turn:
    """The lock of one name, and how many hold it or wait for it."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class SerialWrites:
    """Write transactions with names, for one event loop; of each name at most one has a connection.

    A name is forgotten when nobody uses it, so there are never more names than requests.

    Args:
        what: what the transactions of one name change, for messages.
    """

    def __init__(self, database: AsyncDatabase, what: str) -> None:
        self._database = database
        self._what = what
        self._turns: dict[Hashable, _Turn] = {}

    @property
    def names(self) -> int:
        """Return how many names are in use."""
        return len(self._turns)

    def users(self, name: Hashable) -> int:
        """Return how many transactions of that name run or wait."""
        return self._turns[name].users if name in self._turns else 0

    @asynccontextmanager
    async def write(self, name: Hashable) -> AsyncIterator[AsyncWriteSession]:
        """Open a transaction when no other of that name runs in this process; commit it when the
        block ends.

        Raises:
            LockTimeout: the others, or a lock that another process holds, took too long.
        """
        turn = self._turns.setdefault(name, _Turn())
        turn.users += 1
        try:
            await self._take(turn)
            try:
                async with self._database.write() as session:
                    yield session
            except DBAPIError as exc:
                if exc.orig is None or sqlstate(exc.orig) != LOCK_NOT_AVAILABLE:
                    raise
                raise self._too_long() from exc
            finally:
                turn.lock.release()
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[name]

    async def _take(self, turn: _Turn) -> None:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await turn.lock.acquire()
        except TimeoutError as exc:
            raise self._too_long() from exc

    def _too_long(self) -> LockTimeout:
        return LockTimeout(
            f"other requests have changed {self._what} for too long; nothing was stored, try again"
        )
