"""Health of PostgreSQL and Redis for vdiff: each is asked for a write, not for a sign of life.

`HealthProbe` is the API's, which many probes share: a try a second at most. `probe_database` and
`probe_redis` are for commands. What a refusal means, and what to do, is in `describe_database` and
`describe_redis`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import redis
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared import maintenance_counts
from shared.db.session import AsyncDatabase, Database

PROBE_ACTION = "health_probe"  # a row of its own in maintenance_counts
REDIS_KEY = "vdiff:health"
REDIS_KEY_SECONDS = 60
FRESH_SECONDS = 1.0
TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a server cannot be written to, and what to do about it."""

    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}"


READ_ONLY = Problem(
    "reachable, but takes no writes: it is read-only, or a standby",
    "point VDIFF_DATABASE_URL at the primary (target_session_attrs=read-write), or end its read-only mode",
)
_BY_SQLSTATE = {
    "25006": READ_ONLY,
    "53100": Problem("its disk is full", "make room on PostgreSQL's disk"),
    "53300": Problem(
        "it has no connection left", "raise max_connections, or run fewer API processes and workers"
    ),
    "57P03": Problem("it starts or stops", "wait; see its log if that lasts"),
    "57014": Problem(
        "a write did not end in time",
        "look for long locks, a slow disk or a synchronous standby that is away",
    ),
    "42P01": Problem("not migrated", "run `vdiff migrate`"),
    "42703": Problem("not migrated", "run `vdiff migrate`"),
    "42501": Problem("its role may not write", "grant the role of VDIFF_DATABASE_URL its rights"),
    "28P01": Problem("it refuses the password", "correct VDIFF_DATABASE_URL"),
    "3D000": Problem("the database does not exist", "create it, or correct VDIFF_DATABASE_URL"),
}
_AWAY = Problem("unreachable", "start PostgreSQL, or correct VDIFF_DATABASE_URL")
_ACCEPTED = "jobs are accepted, and start within seconds of its return"


def describe_database(exc: BaseException) -> Problem:
    """Return what an error of the probe's write means."""
    state = getattr(exc.orig, "sqlstate", None) if isinstance(exc, DBAPIError) else None
    if state in _BY_SQLSTATE:
        return _BY_SQLSTATE[str(state)]
    if isinstance(exc, TimeoutError | PoolTimeout):
        return Problem(
            "no answer in time", "see its load and its log, and the number of its connections"
        )
    return (
        _AWAY
        if state is None
        else Problem(f"it refuses a write (SQLSTATE {state})", "see PostgreSQL's log")
    )


def describe_redis(exc: BaseException) -> Problem:
    """Return what an error of the probe's write means."""
    said = str(exc)
    if isinstance(exc, OutOfMemoryError) or said.startswith("OOM"):
        return Problem(
            f"full: it takes no writes; {_ACCEPTED}",
            "raise maxmemory, or remove what is not vdiff's",
        )
    if isinstance(exc, ReadOnlyError):
        return Problem(
            f"a replica: it takes no writes; {_ACCEPTED}",
            "point VDIFF_REDIS_URL at the master, or promote this one",
        )
    if isinstance(exc, BusyLoadingError):
        return Problem(f"it loads its data; {_ACCEPTED}", "wait; see its log if that lasts")
    if isinstance(exc, AuthenticationError):
        return Problem(f"it refuses the password; {_ACCEPTED}", "correct VDIFF_REDIS_URL")
    if isinstance(exc, NoPermissionError):
        return Problem(
            f"its user may not write; {_ACCEPTED}", "give the user of VDIFF_REDIS_URL its rights"
        )
    if isinstance(exc, MasterDownError | ClusterDownError):
        return Problem(f"its master or cluster is down; {_ACCEPTED}", "see the log of Redis")
    if "MISCONF" in said or "snapshot" in said:
        return Problem(
            f"it cannot save to its disk and takes no writes; {_ACCEPTED}",
            "make room on Redis' disk; see its log",
        )
    if "NOREPLICAS" in said or "good replicas" in said:
        return Problem(
            f"too few replicas, so it takes no writes; {_ACCEPTED}", "see min-replicas-to-write"
        )
    if isinstance(exc, ResponseError):
        return Problem(
            f"it refuses a write ({said.split(' ', 1)[0][:40]}); {_ACCEPTED}",
            "see the log of Redis",
        )
    return Problem(f"unreachable; {_ACCEPTED}", "start Redis, or correct VDIFF_REDIS_URL")


def probe_database(database: Database) -> Problem | None:
    """Write a row and COMMIT it; return None when that works."""
    try:
        with database.write() as session:
            session.execute(maintenance_counts.add(PROBE_ACTION, 1))
    except (SQLAlchemyError, OSError) as exc:
        return describe_database(exc)
    return None


def probe_redis(client: redis.Redis) -> Problem | None:
    """Write a key that expires; return None when that works."""
    try:
        client.set(REDIS_KEY, 1, ex=REDIS_KEY_SECONDS)
    except (RedisError, OSError) as exc:
        return describe_redis(exc)
    return None


class HealthProbe:
    """The same for an API process: at most one try a second of each, however many ask."""

    def __init__(
        self, database: AsyncDatabase, client: redis.asyncio.Redis, *, redis_seconds: float
    ) -> None:
        self._database = database
        self._redis = client
        self._of_database = _Shared(self._try_database, TIMEOUT_SECONDS, describe_database)
        self._of_redis = _Shared(self._try_redis, redis_seconds, describe_redis)

    async def database(self) -> Problem | None:
        return await self._of_database.get()

    async def redis(self) -> Problem | None:
        return await self._of_redis.get()

    async def problems(self) -> list[dict[str, str]]:
        """Return `{part, text, advice}` of each server that takes no writes."""
        found = zip(
            ("database", "redis"), await asyncio.gather(self.database(), self.redis()), strict=True
        )
        return [
            {"part": part, "text": one.text, "advice": one.advice}
            for part, one in found
            if one is not None
        ]

    async def _try_database(self) -> None:
        async with self._database.write() as session:
            await session.execute(maintenance_counts.add(PROBE_ACTION, 1))

    async def _try_redis(self) -> None:
        await self._redis.set(REDIS_KEY, 1, ex=REDIS_KEY_SECONDS)


class _Shared:
    """One try at a time, whose result is good for a second."""

    def __init__(
        self,
        attempt: Callable[[], Awaitable[None]],
        seconds: float,
        describe: Callable[[BaseException], Problem],
    ) -> None:
        self._attempt = attempt
        self._seconds = seconds
        self._describe = describe
        self._trying = asyncio.Lock()
        self._good_until = float("-inf")
        self._result: Problem | None = None

    async def get(self) -> Problem | None:
        async with self._trying:
            if time.monotonic() >= self._good_until:
                self._result = await self._try()
                self._good_until = time.monotonic() + FRESH_SECONDS
            return self._result

    async def _try(self) -> Problem | None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._attempt()
        except (SQLAlchemyError, RedisError, OSError, TimeoutError) as exc:
            return self._describe(exc)
        return None
