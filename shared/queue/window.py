"""The window of a queue in Redis: about as many messages as the workers have slots. The rest waits
in PostgreSQL.

    vdiff:window:MODEL    the window's size, kept by the workers' dispatchers; expires when there
                          are none
    vdiff:backlog:QUEUE   jobs wait in PostgreSQL for their message: do not overtake them
    vdiff:dispatch        channel; a model that has a new job without a message

The API pushes a job itself while the window has room and nothing waits, which costs no delay; else
it leaves it to the dispatcher (`worker.dispatcher`), which takes keys in turns. All three are
hints: without them a round of the dispatcher (`worker.dispatcher.LOOK_SECONDS`) finds every job.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from urllib.parse import quote

import redis.asyncio
import structlog
from redis.exceptions import RedisError

from shared.queue.messages import push
from shared.queue.names import queue_name

DISPATCH_CHANNEL = "vdiff:dispatch"
MIN_WINDOW = 4  # also without any worker that says more
WINDOW_SECONDS = 60  # after which nobody keeps it up
BACKLOG_SECONDS = 5
REDIS_SECONDS = 0.5  # longer than that and the dispatcher pushes
REDIS_AWAY_SECONDS = 1.0

_log = structlog.get_logger(__name__)


def window_key(model: str) -> str:
    return f"vdiff:window:{quote(model, safe='')}"


def window_size(stored: bytes | str | None) -> int:
    """Parse what `vdiff:window:MODEL` holds; 0 for anything that no dispatcher writes."""
    text = stored.decode(errors="replace") if isinstance(stored, bytes) else stored or ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else 0


def backlog_key(queue: str) -> str:
    return f"vdiff:backlog:{queue}"


class PushWindow:
    """The API's side. `reserve` before the INSERT, then `push` after COMMIT, or `leave`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._reserved: Counter[str] = Counter()
        self._away_until = float("-inf")

    async def reserve(self, model: str, priority: str) -> bool:
        """Return whether this job's message may go to Redis at once; if so, `push` or `release`
        must follow.
        """
        queue = queue_name(model, priority)
        if time.monotonic() < self._away_until:
            return False
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                pipe = self._redis.pipeline(transaction=False)
                pipe.get(window_key(model))
                pipe.exists(backlog_key(queue))
                pipe.llen(queue)
                size, backlog, length = await pipe.execute()
        except (RedisError, OSError, TimeoutError) as exc:
            self._is_away(exc)
            return False
        if backlog or length + self._reserved[queue] >= max(window_size(size), MIN_WINDOW):
            return False
        self._reserved[queue] += 1
        return True

    def release(self, model: str, priority: str) -> None:
        queue = queue_name(model, priority)
        self._reserved[queue] -= 1
        if self._reserved[queue] <= 0:
            del self._reserved[queue]

    async def push(self, job_id: str, model: str, priority: str) -> bool:
        """Push the message; return whether Redis took it."""
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                await push(self._redis, job_id, model=model, priority=priority)
        except (RedisError, OSError, TimeoutError) as exc:
            self._is_away(exc)
            return False
        return True

    async def leave(self, model: str, priority: str) -> None:
        """Tell the dispatchers that a job waits in PostgreSQL."""
        if time.monotonic() < self._away_until:
            return
        try:
            async with asyncio.timeout(REDIS_SECONDS):
                pipe = self._redis.pipeline(transaction=False)
                pipe.set(backlog_key(queue_name(model, priority)), 1, ex=BACKLOG_SECONDS)
                pipe.publish(DISPATCH_CHANNEL, model)
                await pipe.execute()
        except (RedisError, OSError, TimeoutError) as exc:
            self._is_away(exc)

    def _is_away(self, exc: Exception) -> None:
        self._away_until = time.monotonic() + REDIS_AWAY_SECONDS
        _log.warning(
            "redis_away", error=type(exc).__name__
        )  # the dispatcher pushes when it is back
