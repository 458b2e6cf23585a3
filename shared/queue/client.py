"""The Redis client of threads: short timeouts, one immediate retry, no back-off of its own.

redis-py sleeps up to 10 s between its retries by default. Here the loops back off themselves
(`shared.background`), so that they notice within a second or two that Redis is back.
"""

from __future__ import annotations

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

TIMEOUT_SECONDS = 5.0
HEALTH_CHECK_SECONDS = 30


def connect(redis_url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> redis.Redis:
    """Return a client that connects on first use. Raises ValueError for a URL that redis-py does
    not know.
    """
    return redis.Redis.from_url(
        redis_url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        health_check_interval=HEALTH_CHECK_SECONDS,
        retry=Retry(NoBackoff(), 1),
    )
