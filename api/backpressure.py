"""Backpressure of the sync endpoints: a request beyond a limit waits inside itself until it fits,
instead of failing.

Who waits for the same limit is let in one after the other, in the order of arrival, and only the
first of them asks. The wait ends with the limit's own 429 when the client's patience is over, and
at once when the client leaves (its place is free then) or the process is told to stop. How many may
wait is bounded, and how large their bodies are together, and each line has a share of both, so that
one key leaves room for others; beyond that the 429 comes at once.

A try that began is never cut off: one that stores a job must know whether it did.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from shared.errors import Overloaded, TooManyRequests
from shared.metrics import REQUESTS_WAITING

POLL_SECONDS = 0.25  # how late free room may be noticed
MARGIN_SECONDS = 1.0  # before the client's own timeout
LINE_SHARE = 4  # a line has a quarter of the room
WAITING_BYTES_MAX = (
    128 << 20
)  # of the bodies of all who wait; parsed they take several times as much

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed its connection while its request waited."""


def patience_seconds(request: Request, longest: float) -> float:
    """Return how long this client waits for an answer: `longest`, or a little less than its SDK's
    timeout.
    """
    told = request.headers.get("x-stainless-read-timeout", "")
    try:
        seconds = float(told)
    except ValueError:
        return longest
    return min(longest, max(0.0, seconds - MARGIN_SECONDS)) if seconds > 0 else longest


async def disconnected(request: Request) -> None:
    """Returns when the client is gone. Only after the body was read: it takes what comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Visit:
    """One sync request: until when its client waits, and whether it still does.

    Args:
        longest: seconds for all of it.
        size: bytes of its body.
    """

    def __init__(
        self, request: Request, stopping: asyncio.Event, *, longest: float, size: int = 0
    ) -> None:
        self._request = request
        self.size = size
        self._stopping = stopping
        began = time.monotonic()
        self.waits_until = began + patience_seconds(request, longest)  # for room
        self.ends_at = began + longest  # for the answer, once there is a job

    @property
    def remaining_seconds(self) -> float:
        return max(0.0, self.ends_at - time.monotonic())

    async def sleep(self, seconds: float, waking: asyncio.Event) -> None:
        """Until `waking` is set, so many seconds at most. Raises ClientLeft, Overloaded (the
        process stops).
        """
        tasks = [
            asyncio.ensure_future(coroutine)
            for coroutine in (disconnected(self._request), self._stopping.wait(), waking.wait())
        ]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if tasks[0] in done:
            raise ClientLeft
        if tasks[1] in done:
            raise Overloaded("the server is stopping; send the request again")


class WaitingRoom:
    """Everybody who waits for room, in a line per limit; one for an API process."""

    def __init__(self, most: int, most_bytes: int = WAITING_BYTES_MAX) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._waiting = self._bytes = 0
        self._line_bytes: dict[str, int] = {}
        self._lines: dict[
            str, deque[asyncio.Event]
        ] = {}  # the first's event is set: it is the one who asks

    async def admit(self, line: str, visit: Visit, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of the first call of `attempt` that does not raise TooManyRequests.

        Raises:
            TooManyRequests: the last one, when the patience is over or too many wait already.
            ClientLeft, Overloaded (the process stops).
        """
        if line not in self._lines:
            try:
                return await attempt()
            except TooManyRequests as exc:
                refused = exc
        else:
            refused = TooManyRequests(
                "earlier requests of this key wait for room under its limit; try again later"
            )
        if not self._has_room(line, visit.size):
            raise refused
        queue = self._lines.setdefault(line, deque())
        mine = asyncio.Event()
        queue.append(mine)
        queue[0].set()
        self._waiting += 1
        self._bytes += visit.size
        self._line_bytes[line] = self._line_bytes.get(line, 0) + visit.size
        REQUESTS_WAITING.inc()
        try:
            while (left := visit.waits_until - time.monotonic()) > 0:
                if queue[0] is not mine:
                    await visit.sleep(left, mine)
                    continue
                await visit.sleep(min(POLL_SECONDS, left), asyncio.Event())
                try:
                    return await attempt()
                except TooManyRequests as exc:
                    refused = exc
            raise refused
        finally:
            self._waiting -= 1
            self._bytes -= visit.size
            self._line_bytes[line] -= visit.size
            REQUESTS_WAITING.dec()
            queue.remove(mine)
            if queue:
                queue[0].set()
            else:
                del self._lines[line], self._line_bytes[line]

    def _has_room(self, line: str, size: int) -> bool:
        """The first of a line finds room whenever all together leave some."""
        if self._waiting >= self._most or (self._waiting and self._bytes + size > self._most_bytes):
            return False
        ahead = len(self._lines.get(line, ()))
        held = self._line_bytes.get(line, 0) + size
        return not ahead or (
            ahead < max(1, self._most // LINE_SHARE) and held <= self._most_bytes // LINE_SHARE
        )
