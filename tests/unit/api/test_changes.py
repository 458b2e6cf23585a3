"""Streams of changes: one reading for all followers, the newest state for slow ones, and an end
when there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from api import changes as module
from api.changes import Changes
from shared.errors import NotFound


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACE_SECONDS", 0.001)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.004)
    monkeypatch.setattr(module, "READS_PER_SECOND", 1_000.0)
    monkeypatch.setattr(module, "COST_SHARE", 1)


class Source:
    """An object that is read; counts how often."""

    def __init__(self) -> None:
        self.reads = self.value = 0
        self.error: Exception | None = None

    async def __call__(self) -> dict[str, Any]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return {"n": self.value}


@pytest.fixture
async def changes() -> AsyncIterator[Changes]:
    made = Changes(asyncio.Event())
    yield made
    await made.stop()


async def take(stream: AsyncIterator[bytes]) -> str:
    async with asyncio.timeout(30):
        return (await anext(stream)).decode()


async def test_all_followers_of_an_object_cost_one_reading(changes: Changes) -> None:
    source = Source()
    streams = [changes.follow("thing", "a", source) for _ in range(50)]
    for stream in streams:
        assert '"n":0' in await take(stream)
    assert source.reads < 50
    source.value = 1
    for stream in streams:
        assert "event: thing" in (told := await take(stream)) and '"n":1' in told
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)
    reads = source.reads
    await asyncio.sleep(0.05)
    assert source.reads == reads  # nobody follows it any more


async def test_a_slow_follower_gets_the_newest_state(changes: Changes) -> None:
    source = Source()
    slow, quick = changes.follow("thing", "a", source), changes.follow("thing", "a", source)
    await take(slow)
    await take(quick)
    for value in range(1, 20):
        source.value = value
        assert f'"n":{value}' in await take(quick)
    assert '"n":19' in await take(slow)


async def test_many_objects_are_one_reading(changes: Changes) -> None:
    asked: list[int] = []
    single = Source()

    async def read_all(keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        asked.append(len(keys))
        return {key: {"key": key, "n": 1} for key in keys if key != "gone"}

    keys = [str(i) for i in range(100)]
    streams = {
        key: changes.follow("thing", key, single, read_all=read_all) for key in [*keys, "gone"]
    }
    for stream in streams.values():
        assert '"n":0' in await take(stream)
    for key in keys:
        assert f'"key":"{key}","n":1' in await take(streams[key])
    assert max(asked) > 50
    with pytest.raises(NotFound):
        await take(streams["gone"])


async def test_trouble_is_told_once_and_the_object_again_after_it(changes: Changes) -> None:
    source = Source()
    stream = changes.follow("thing", "a", source)
    await take(stream)
    source.error = OperationalError("", {}, Exception())
    assert "event: trouble" in await take(stream)
    source.error = None
    assert '"n":0' in await take(stream)


async def test_the_end_is_told_and_a_bug_ends_only_its_own_streams(changes: Changes) -> None:
    source, broken = Source(), Source()
    stream = changes.follow("thing", "a", source, is_over=lambda shown: shown["n"] == 2)
    bad = changes.follow("thing", "b", broken)
    await take(stream)
    await take(bad)
    broken.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await take(bad)
    source.value = 2
    assert "event: done" in await take(stream)
    with pytest.raises(StopAsyncIteration):
        await take(stream)
