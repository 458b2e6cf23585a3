"""A caretaker of rows that need more than a request: claims one at a time under a lease, works,
lets go.

What is due and what to do is the subclass's (`shared.batches.caretaker`,
`shared.evaluations.caretaker`). Every write carries the holder, so that one that lost its lease
changes nothing; who dies is followed when the lease runs out (ADR 0011).
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog
from redis.exceptions import RedisError
from sqlalchemy import Executable, Row
from sqlalchemy.exc import SQLAlchemyError

from shared.background import Duty, OnGone, watch_task
from shared.db.serial import LockTimeout
from shared.db.session import AsyncDatabase
from shared.fair_turns import LastServed
from shared.files.store import StoreUnavailable
from shared.ids import new_id
from shared.metrics import API_DUTY_FAILURES

TOGETHER = 3  # rows that one process works on, of one tenant all but one
LOOK_SECONDS = 1.0

_log = structlog.get_logger(__name__)


class Lost(Exception):
    """The row is not ours any more, or somebody moved it."""


class Caretaker(ABC):
    """One per process and kind; `wake` is set when there is something to do."""

    kind: str  # in logs and names of tasks
    together = TOGETHER

    def __init__(
        self, database: AsyncDatabase, *, lease_seconds: float, wake: asyncio.Event
    ) -> None:
        self._database = database
        self._lease = lease_seconds
        self._wake = wake
        self._task: asyncio.Task[None] | None = None
        # Between two looks, each is tried whatever becomes of the other.
        self._taking = Duty(
            f"take_{self.kind}", lambda: None, every=0.0, failures=API_DUTY_FAILURES
        )
        self._tidying = Duty(
            f"tidy_{self.kind}", lambda: None, every=0.0, failures=API_DUTY_FAILURES
        )
        self._working: dict[asyncio.Task[None], str] = {}  # with the tenant
        self._served = LastServed()

    @abstractmethod
    def claim(self, holder: str, *, served: Sequence[str], full: Sequence[str]) -> Executable:
        """A row that is due and that nobody holds, held by `holder` now.

        Args:
            served: tenants that were served lately, longest ago first: those that are not in it
                have their turn first.
            full: tenants that have no further row now.
        """

    @abstractmethod
    def release(self, row_id: str, holder: str, *, for_seconds: float) -> Executable:
        """Let go; nobody looks at it again before that."""

    @abstractmethod
    async def see_to(self, row: Row[Any], holder: str) -> float:
        """Do what the row needs now; the seconds until it needs somebody again. Raises Lost."""

    async def now_and_then(self) -> None:  # noqa: B027  # not every kind has something
        """Between two looks."""

    def start(self, on_gone: OnGone = lambda reason: None) -> None:
        self._task = asyncio.create_task(self._run(), name=f"{self.kind}-caretaker")
        watch_task(self._task, on_gone)

    async def stop(self) -> None:
        """Let go of everything; another process goes on at once."""
        tasks = [t for t in (self._task, *self._working) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            for duty, run in ((self._taking, self._take_all), (self._tidying, self.now_and_then)):
                if not duty.is_due():
                    continue
                try:
                    await run()
                except Exception as exc:
                    duty.due_at = time.monotonic() + duty.failed(exc)
                else:
                    duty.succeeded()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()

    async def _take_all(self) -> None:
        while len(self._working) < self.together and await self._take():
            pass

    async def _take(self) -> bool:
        holder = new_id("holder")
        of_tenants = Counter(self._working.values())
        full = [
            tenant for tenant, count in of_tenants.items() if count >= max(1, self.together - 1)
        ]
        statement = self.claim(holder, served=self._served.oldest_first(), full=full)
        async with self._database.write() as session:
            row = (await session.execute(statement)).one_or_none()
        if row is None:
            return False
        self._served.note(row.tenant)
        task = asyncio.create_task(self._work(row, holder), name=f"{self.kind} {row.id}")
        self._working[task] = row.tenant
        task.add_done_callback(self._done)
        return True

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working.pop(task, None)
        self._wake.set()

    async def _work(self, row: Row[Any], holder: str) -> None:
        log = _log.bind(**{f"{self.kind}_id": row.id})
        pause = 0.0
        try:
            pause = await self.see_to(row, holder)
        except Lost:
            log.info(f"{self.kind}_let_go")
        except (SQLAlchemyError, OSError, RedisError, StoreUnavailable, LockTimeout) as exc:
            log.warning(f"{self.kind}_interrupted", error=type(exc).__name__)
            pause = LOOK_SECONDS
        except Exception:
            log.exception(
                f"{self.kind}_failed_unexpectedly"
            )  # it is tried again, and the log says why
            pause = self._lease
        finally:
            try:
                async with self._database.write() as session:
                    await session.execute(self.release(row.id, holder, for_seconds=pause))
            except (SQLAlchemyError, OSError) as exc:
                log.warning(
                    f"{self.kind}_not_released", error=type(exc).__name__
                )  # the lease runs out
