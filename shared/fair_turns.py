"""Turns at something that few may do at once; tenants take them one after the other, however many
things one has to do.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairTurns:
    """At most `together` turns at once, of one tenant at most all but one; for one event loop."""

    def __init__(self, together: int) -> None:
        self._together = together
        self._of_one = max(1, together - 1)
        self._taken: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn and hold it while the block runs."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(tenant)
            raise
        try:
            yield
        finally:
            self._end(tenant)

    def _end(self, tenant: str) -> None:
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._give()

    def _give(self) -> None:
        """Give free turns to the tenants that waited longest."""
        given = True
        while given and self._taken.total() < self._together:
            given = False
            for tenant in list(self._waiting):
                if self._taken.get(tenant, 0) < self._of_one and self._give_to(tenant):
                    given = True
                    break

    def _give_to(self, tenant: str) -> bool:
        waiting = self._waiting.pop(tenant)
        while waiting:
            turn = waiting.popleft()
            if turn.done():  # whoever waited was cancelled
                continue
            self._taken[tenant] += 1
            turn.set_result(None)
            if waiting:
                self._waiting[tenant] = waiting  # behind the others
            return True
        return False


class LastServed:
    """The tenants that were served lately, longest ago first."""

    def __init__(self, most: int = 1_000) -> None:
        self._tenants: OrderedDict[str, None] = OrderedDict()
        self._most = most

    def note(self, tenant: str) -> None:
        self._tenants.pop(tenant, None)
        self._tenants[tenant] = None
        if len(self._tenants) > self._most:
            self._tenants.popitem(last=False)

    def oldest_first(self) -> list[str]:
        return list(self._tenants)
