"""Jobs by state for /metrics: how often the whole ledger is read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

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
