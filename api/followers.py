"""Bounds of the clients that wait or follow at once: streams, long polls and sync calls of one API
process.

An idle follower costs memory and a connection, no query and no message. Each key has a share, so
that one key leaves room for others; a client beyond either bound gets a 429 that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from shared.errors import TooManyRequests
from shared.keys.principal import Principal
from shared.metrics import FOLLOWERS

RETRY_AFTER_SECONDS = 10.0


class Place:
    """One follower's place; it is left once, however often that is said."""

    __slots__ = ("_followers", "_who")

    def __init__(self, followers: Followers, who: str) -> None:
        self._followers: Followers | None = followers
        self._who = who

    def leave(self) -> None:
        followers, self._followers = self._followers, None
        if followers is not None:
            followers.remove(self._who)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Followers:
    """Counts them; one per API process."""

    def __init__(self, *, most: int, most_per_key: int) -> None:
        self._most, self._most_per_key = most, most_per_key
        self._by_key: Counter[str] = Counter()
        self._total = 0

    def enter(self, principal: Principal) -> Place:
        """Take a place. Raises TooManyRequests, which names the limit."""
        who = principal.key_id or principal.tenant
        if self._by_key[who] >= self._most_per_key:
            raise TooManyRequests(
                f"this API key waits for or follows {self._most_per_key} jobs and lists at one API process, the most that "
                "VDIFF_MAX_FOLLOWERS_PER_KEY allows; end some of these requests, or poll without wait",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if self._total >= self._most:
            raise TooManyRequests(
                f"{self._most} clients wait or follow at this API process, the most that VDIFF_MAX_FOLLOWERS allows; try "
                "again later, or poll without wait",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        self._by_key[who] += 1
        self._total += 1
        FOLLOWERS.inc()
        return Place(self, who)

    def remove(self, who: str) -> None:
        self._by_key[who] -= 1
        if self._by_key[who] <= 0:
            del self._by_key[who]
        self._total -= 1
        FOLLOWERS.dec()


class FollowingStream(EventSourceResponse):
    """Server-sent events that hold a place until they end."""

    def __init__(self, events: AsyncIterator[bytes], place: Place) -> None:
        self._place = place
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.leave()
