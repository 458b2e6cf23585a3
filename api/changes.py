"""Streams that tell one object whenever it changed, for pages that follow something without asking
again and again.

An object is read once for all its followers, by one task of the process for each kind of object.
However many follow, the task reads one object at a time, at most `READS_PER_SECOND`, and for no
more than a small share of the time; what stays the same is read less and less often. A kind that
can be read many at a time (`read_all`) takes one round for all of them.

A stream says `trouble` while PostgreSQL is away, and ends by itself, so that a client's key is
looked at again. A follower that reads slowly gets the newest state and misses those between.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import NotFound

PACE_SECONDS = 1.0
IDLE_SECONDS = 5.0  # the slowest pace, of what stays the same
READS_PER_SECOND = 4.0  # of one kind, together
COST_SHARE = 20  # one part of so many, at most, goes into reading
KEEPALIVE_SECONDS = 15.0
STREAM_SECONDS = 600.0  # then the client comes again, and its key is looked at again
MANY_MAX = 500  # objects that one `read_all` is asked for

Shown = dict[str, Any]
Read = Callable[[], Awaitable[Shown]]
ReadAll = Callable[[Sequence[Any]], Awaitable[Mapping[Any, Shown]]]


@dataclass(slots=True, eq=False)
class _Followed:
    """One object, for all who follow it."""

    key: Hashable
    read: Read
    followers: set[asyncio.Event] = field(default_factory=set)
    text: str = ""
    over: bool = False
    trouble: bool = False
    failure: Exception | None = None
    due_at: float = 0.0
    pace_seconds: float = PACE_SECONDS

    def take(self, shown: Shown, over: bool) -> None:
        text = json.dumps(shown, separators=(",", ":"))
        same = text == self.text and not self.trouble and not over
        self.pace_seconds = min(2 * self.pace_seconds, IDLE_SECONDS) if same else PACE_SECONDS
        self.text, self.over, self.trouble = text, over, False
        if not same:
            self.tell()

    def fail(self, failure: Exception | None) -> None:
        """Args: failure: what ends the streams; None is trouble that passes."""
        self.failure, self.trouble = failure, failure is None
        self.tell()

    def tell(self) -> None:
        for event in self.followers:
            event.set()


class _Kind:
    """The followed objects of one kind, and the task that reads them."""

    def __init__(self, is_over: Callable[[Shown], bool], read_all: ReadAll | None) -> None:
        self.followed: dict[Hashable, _Followed] = {}
        self.task: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()
        self._is_over = is_over
        self._read_all = read_all

    async def run(self) -> None:
        """Read what is due until nobody follows anything."""
        while self.followed:
            now = time.monotonic()
            due = [one for one in self.followed.values() if one.due_at <= now]
            if not due:
                await self._rest(min(one.due_at for one in self.followed.values()) - now)
                continue
            due.sort(key=lambda one: one.due_at)
            chosen = due[: MANY_MAX if self._read_all else 1]
            await self._read(chosen)
            cost = time.monotonic() - now
            for one in chosen:
                one.due_at = time.monotonic() + one.pace_seconds
            await asyncio.sleep(max(1 / READS_PER_SECOND, (COST_SHARE - 1) * cost))

    async def _rest(self, seconds: float) -> None:
        self.wake.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.wake.wait(), max(0.0, seconds))

    async def read_one(self, one: _Followed) -> None:
        """Read an object that is new here."""
        try:
            shown = await one.read()
        except (SQLAlchemyError, OSError):
            one.fail(None)
        except Exception as exc:
            self._fail(one, exc)
        else:
            self._take(one, shown)

    def _take(self, one: _Followed, shown: Shown) -> None:
        over = self._is_over(shown)
        if over and self.followed.get(one.key) is one:
            del self.followed[one.key]  # it may begin again, for those who come later
        one.take(shown, over)

    def _fail(self, one: _Followed, failure: Exception) -> None:
        if self.followed.get(one.key) is one:
            del self.followed[one.key]
        one.fail(failure)

    async def _read(self, chosen: Sequence[_Followed]) -> None:
        if self._read_all is None:
            for one in chosen:
                await self.read_one(one)
            return
        try:
            found = await self._read_all([one.key for one in chosen])
        except (SQLAlchemyError, OSError):
            for one in chosen:
                one.fail(None)
            return
        except (
            Exception
        ) as exc:  # the object went, or a bug: theirs to see, and no end of this task
            for one in chosen:
                self._fail(one, exc)
            return
        for one in chosen:
            if one.key in found:
                self._take(one, found[one.key])
            else:
                self._fail(one, NotFound("what was followed is not there any more"))


class Changes:
    """Every followed object of one API process."""

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self._kinds: dict[str, _Kind] = {}

    async def stop(self) -> None:
        self.wake_everybody()
        for kind in self._kinds.values():
            if kind.task is not None:
                kind.task.cancel()
        tasks = [kind.task for kind in self._kinds.values() if kind.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake_everybody(self) -> None:
        """Let every stream look whether the process stops."""
        for kind in self._kinds.values():
            for one in kind.followed.values():
                one.tell()

    async def follow(
        self,
        event: str,
        key: Hashable,
        read: Read,
        *,
        is_over: Callable[[Shown], bool] = lambda _: False,
        read_all: ReadAll | None = None,
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events: `event` with what `read` gave; the last one is called `done`
        once `is_over` says so.

        Args:
            key: followers with an equal key see the same object.
            read_all: reads many objects by their keys; an object that it leaves out is gone.
        """
        kind = self._kinds.setdefault(event, _Kind(is_over, read_all))
        one = kind.followed.get(key)
        mine = asyncio.Event()
        if one is None:  # the first follower reads it, as a GET would; from then on the task does
            one = kind.followed[key] = _Followed(key, read, due_at=time.monotonic() + PACE_SECONDS)
            one.followers.add(mine)
            await kind.read_one(one)
        one.followers.add(mine)
        kind.wake.set()
        if kind.task is None or kind.task.done():
            kind.task = asyncio.create_task(kind.run(), name=f"vdiff-changes {event}")
        last, until, told_trouble = "", time.monotonic() + STREAM_SECONDS, False
        try:
            while not self._stopping.is_set() and time.monotonic() < until:
                mine.clear()
                if one.failure is not None:
                    raise one.failure
                if one.over:
                    yield format_sse_event(data_str=one.text, event="done")
                    return
                if one.trouble and not told_trouble:
                    told_trouble, last = (
                        True,
                        "",
                    )  # the object is told again when the trouble is over
                    yield format_sse_event(
                        data_str='{"code":"database_unavailable"}', event="trouble"
                    )
                    continue
                told_trouble = one.trouble
                if one.text != last and not one.trouble:
                    last = one.text
                    yield format_sse_event(data_str=last, event=event)
                    continue
                try:
                    await asyncio.wait_for(mine.wait(), KEEPALIVE_SECONDS)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
        finally:
            one.followers.discard(mine)
            if not one.followers and kind.followed.get(key) is one:
                del kind.followed[key]
                kind.wake.set()
