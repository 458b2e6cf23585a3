"""The meaning of a refusal of PostgreSQL or Redis; many probes cost one try."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from sqlalchemy.exc import OperationalError

from shared import health


class _Refused(Exception):
    def __init__(self, state: str | None) -> None:
        self.sqlstate = state


@pytest.mark.parametrize(
    ("state", "text", "advice"),
    [
        ("25006", "takes no writes", "primary"),
        ("53100", "disk is full", "room"),
        ("53300", "no connection left", "max_connections"),
        ("42P01", "not migrated", "vdiff migrate"),
        ("42501", "may not write", "grant"),
        ("XX000", "XX000", "log"),
        (None, "unreachable", "start PostgreSQL"),
    ],
)
def test_what_postgresql_means(state: str | None, text: str, advice: str) -> None:
    problem = health.describe_database(OperationalError("s", {}, _Refused(state)))
    assert text in problem.text and advice in problem.advice


@pytest.mark.parametrize(
    ("error", "text", "advice"),
    [
        (OutOfMemoryError("command not allowed"), "full", "maxmemory"),
        (ReadOnlyError("You can't write against a read only replica."), "replica", "master"),
        (BusyLoadingError("x"), "loads", "wait"),
        (AuthenticationError("x"), "password", "VDIFF_REDIS_URL"),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), "save", "disk"),
        (
            ResponseError("NOREPLICAS Not enough good replicas to write."),
            "replicas",
            "min-replicas",
        ),
        (ConnectionError("x"), "unreachable", "start Redis"),
    ],
)
def test_what_redis_means(error: Exception, text: str, advice: str) -> None:
    problem = health.describe_redis(error)
    assert text in problem.text and advice in problem.advice and "jobs are accepted" in problem.text


def test_many_probes_cost_one_write() -> None:
    writes: list[str] = []

    class Client:
        async def set(self, key: str, value: int, *, ex: int) -> None:
            writes.append(key)
            await asyncio.sleep(0)
            raise ReadOnlyError("x")

    async def run() -> list[health.Problem | None]:
        probe = health.HealthProbe(SimpleNamespace(), Client(), redis_seconds=5.0)  # type: ignore[arg-type]
        return await asyncio.gather(*(probe.redis() for _ in range(200)))

    answers = asyncio.run(run())
    assert len(writes) <= 3, "a second each, however slow this machine is"
    assert all(answer is not None and "replica" in answer.text for answer in answers)
