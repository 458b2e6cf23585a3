"""Waiting for a job's end: the message, the backstop when it is lost, and the time limit. No Redis: nothing is heard here
unless a test says so; `tests/integration` has the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import redis.asyncio

from shared.events import DoneWaiter, _decode, _flat


@pytest.fixture
def waiter() -> Iterator[DoneWaiter]:
    yield DoneWaiter(redis.asyncio.Redis())  # connects only when started


class Row:
    """A job's row that is done at the nth reading."""

    def __init__(self, done_at: int) -> None:
        self.reads, self.done_at = 0, done_at

    async def __call__(self) -> bool:
        self.reads += 1
        return self.reads >= self.done_at


def done(row: bool) -> bool:
    return row


async def test_the_message_wakes_all_who_wait(waiter: DoneWaiter) -> None:
    async def one() -> bool:
        waiter.register("a")
        try:
            return await waiter.wait_for("a", Row(1), is_done=done, timeout_seconds=60, reread_seconds=60)
        finally:
            waiter.forget("a")

    waiting = [asyncio.create_task(one()) for _ in range(3)]
    await asyncio.sleep(0)
    waiter._wake("b")
    waiter._wake("a")
    assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == [True] * 3
    assert not waiter.waits("a")


async def test_a_lost_message_costs_one_rereading(waiter: DoneWaiter) -> None:
    waiter.register("a")
    row = Row(3)
    assert await waiter.wait_for("a", row, is_done=done, timeout_seconds=60, reread_seconds=0.01)
    assert row.reads == 3


async def test_time_runs_out_with_the_row_as_it_is(waiter: DoneWaiter) -> None:
    waiter.register("a")
    row = Row(10**9)
    assert await waiter.wait_for("a", row, is_done=done, timeout_seconds=0.05, reread_seconds=10) is False
    assert row.reads == 1
    assert await waiter.wait_for("a", row, is_done=done, timeout_seconds=0) is False


async def test_the_message_of_an_earlier_life_is_not_believed(waiter: DoneWaiter) -> None:
    waiter.register("a")
    waiter._wake("a")
    row = Row(3)
    assert await waiter.wait_for("a", row, is_done=done, timeout_seconds=60, reread_seconds=0.01)
    assert row.reads == 3  # it did not spin


def test_forgetting_is_counted(waiter: DoneWaiter) -> None:
    waiter.register("a")
    waiter.register("a")
    waiter.forget("a")
    assert waiter.waits("a")
    waiter.forget("a")
    waiter.forget("a")
    assert not waiter.waits("a")


def test_entries_of_both_protocols_read_alike() -> None:
    entry = (b"1-0", {b"t": b"done", b"d": b'{"status":"failed"}'})
    assert _flat([entry]) == _flat([[entry]]) == [entry]
    assert _flat([]) == []
    assert _decode(*entry) == ("1-0", "done", {"status": "failed"})
    assert _decode("1-0", {"t": "x", "d": "{}"}) == ("1-0", "x", {})
