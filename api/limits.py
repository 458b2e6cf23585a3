"""Requests per minute, counted in Redis over all API processes; in this process alone while Redis
is away.

A sliding window of one minute. The headers of both customs go out: `RateLimit`/`RateLimit-Policy`
(the IETF's draft) and OpenAI's `x-ratelimit-*-requests`. A caller without a limit costs nothing and
gets none of them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

import redis.asyncio
import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import RateLimiter, SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from shared.errors import RETRY_AFTER_MAX_SECONDS, TooManyRequests
from shared.keys.principal import Principal

REDIS_SECONDS = 0.25  # longer than that and the request is counted here
REDIS_AWAY_SECONDS = 5.0  # before it is asked again
KEY_PREFIX = "vdiff:limits"

_log = structlog.get_logger(__name__)


class RequestLimiter:
    def __init__(self, client: redis.asyncio.Redis, url: str) -> None:
        storage = RedisStorage(
            f"async+{url}".replace("async+unix", "async+redis+unix"),
            implementation="redispy",
            key_prefix=KEY_PREFIX,
            connection_pool=client.connection_pool,  # type: ignore[arg-type]
        )
        self._shared = SlidingWindowCounterRateLimiter(storage)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._away_until = float("-inf")

    async def hit(self, principal: Principal) -> Mapping[str, str]:
        """Count one request; the headers that say so. Raises TooManyRequests."""
        per_minute = principal.limits.requests_per_minute
        if per_minute is None:
            return {}
        item = RateLimitItemPerMinute(per_minute)
        allowed, remaining, reset_seconds = await self._count(
            item, principal.key_id or principal.tenant
        )
        headers = rate_headers(per_minute, remaining, reset_seconds)
        if not allowed:
            wait = min(max(reset_seconds, 1.0), RETRY_AFTER_MAX_SECONDS)
            raise TooManyRequests(
                f"more than {per_minute} requests in a minute; try again in {math.ceil(wait)} s",
                retry_after_seconds=wait,
                headers=headers,
            )
        return headers

    async def _count(self, item: RateLimitItemPerMinute, who: str) -> tuple[bool, int, float]:
        if time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    return await _hit(self._shared, item, who)
            except (RedisError, OSError, TimeoutError) as exc:
                _log.warning("limits_counted_locally", error=type(exc).__name__)
                self._away_until = time.monotonic() + REDIS_AWAY_SECONDS
        return await _hit(self._own, item, who)


async def _hit(
    limiter: RateLimiter, item: RateLimitItemPerMinute, who: str
) -> tuple[bool, int, float]:
    allowed = await limiter.hit(item, who)
    stats = await limiter.get_window_stats(item, who)
    return allowed, max(0, int(stats.remaining)), max(0.0, stats.reset_time - time.time())


def rate_headers(limit: int, remaining: int, reset_seconds: float) -> dict[str, str]:
    reset = math.ceil(reset_seconds)
    return {
        "RateLimit-Policy": f'"requests";q={limit};w=60',
        "RateLimit": f'"requests";r={remaining};t={reset}',
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
        "x-ratelimit-reset-requests": f"{reset}s",
    }
