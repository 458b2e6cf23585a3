"""Jobs by state for /metrics: how often the whole ledger is read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api.routes import metrics


async def test_a_long_ledger_is_read_for_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []

    async def execute(statement: Any) -> Any:
        asked.append(statement)
        clock[0] += 2.0  # so long it takes to count
        return SimpleNamespace(all=lambda: [len(asked)])

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    counts, session = metrics.StatusCounts(), SimpleNamespace(execute=execute)
    assert await asyncio.gather(*(counts.read(session) for _ in range(3))) == [[1], [1], [1]]  # type: ignore[arg-type]
    clock[0] += 37.0
    assert await counts.read(session) == [1]  # type: ignore[arg-type]
    clock[0] += 2.0
    assert await counts.read(session) == [2]  # type: ignore[arg-type]


async def test_a_ledger_that_cannot_be_counted_in_time_is_no_database_that_is_away() -> None:
    asked = []

    async def execute(statement: Any) -> Any:
        asked.append(statement)
        if len(asked) == 1:
            return SimpleNamespace(all=lambda: ["counted"])
        driver = Exception("canceling statement due to statement timeout")
        driver.sqlstate = "57014"  # type: ignore[attr-defined]
        raise OperationalError("SELECT", {}, driver)

    counts, session = metrics.StatusCounts(), SimpleNamespace(execute=execute)
    assert await counts.read(session) == ["counted"]  # type: ignore[arg-type]
    counts._good_until = 0.0
    assert await counts.read(session) == ["counted"]  # type: ignore[arg-type]
    assert len(asked) == 2
