"""Waiting for a job: messages wake, one query serves all, nothing that happens in between is
missed.

No Redis here: a message is heard when a test says so. `tests/integration/test_followers.py` has the
real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import redis.asyncio

from shared.events import DONE_CHANNEL, IGNORED, MOVED_CHANNEL, _decode, _flat, entries_of
from shared.watch import REREAD_CHUNK, JobWatch


class Database:
    """Says which jobs are over, and counts how often it is asked."""

    def __init__(self) -> None:
        self.over: set[str] = set()
        self.queries: list[int] = []

    async def read_over(self, job_ids: Sequence[str]) -> list[str]:
        self.queries.append(len(job_ids))
        return [job_id for job_id in job_ids if job_id in self.over]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def watch(database: Database) -> JobWatch:
    return JobWatch(redis.asyncio.Redis(), database.read_over)  # connects only when started


class Row:
    """A job's row that is done at the nth reading."""

    def __init__(self, done_at: int) -> None:
        self.reads, self.done_at = 0, done_at

    async def __call__(self) -> bool:
        self.reads += 1
        return self.reads >= self.done_at


def done(row: bool) -> bool:
    return row


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_message_wakes_all_who_wait_for_the_job_and_nobody_else(watch: JobWatch) -> None:
    rows = [Row(2) for _ in range(3)]
    stranger = Row(2)
    waiting = [
        asyncio.create_task(watch.wait_for("a", row, is_done=done, timeout_seconds=60))
        for row in rows
    ]
    other = asyncio.create_task(watch.wait_for("b", stranger, is_done=done, timeout_seconds=60))
    await settle()
    watch._hear(DONE_CHANNEL, "a")
    assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == [True] * 3
    assert (watch.waits("a"), watch.waits("b"), stranger.reads) == (False, True, 1)
    other.cancel()


async def test_an_end_between_the_reading_and_the_wait_is_not_missed(watch: JobWatch) -> None:
    row = Row(2)

    async def read() -> bool:
        found = await row()
        watch._hear(DONE_CHANNEL, "a")  # committed just after the row was read
        return found

    assert await asyncio.wait_for(watch.wait_for("a", read, is_done=done, timeout_seconds=60), 20)
    assert row.reads == 2


async def test_lost_messages_cost_one_query_for_all_who_wait(
    watch: JobWatch, database: Database
) -> None:
    count = 2 * REREAD_CHUNK + 1
    rows = [Row(2) for _ in range(count)]
    waiting = [
        asyncio.create_task(watch.wait_for(f"job{i}", row, is_done=done, timeout_seconds=60))
        for i, row in enumerate(rows)
    ]
    await settle()
    for _ in range(5):
        await watch.look()
    assert database.queries == 5 * [REREAD_CHUNK, REREAD_CHUNK, 1]
    assert all(row.reads == 1 for row in rows)  # nobody looks for himself
    database.over = {f"job{i}" for i in range(count)}
    await watch.look()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 60) == [True] * count
    assert all(row.reads == 2 for row in rows)


async def test_time_runs_out_with_the_row_as_it_is(watch: JobWatch) -> None:
    row = Row(10**9)
    assert await watch.wait_for("a", row, is_done=done, timeout_seconds=0.05) is False
    assert row.reads == 2
    assert await watch.wait_for("a", row, is_done=done, timeout_seconds=0) is False
    assert not watch.waits("a")


async def test_messages_that_are_not_true_are_not_believed(watch: JobWatch) -> None:
    row = Row(4)
    waiting = asyncio.create_task(watch.wait_for("a", row, is_done=done, timeout_seconds=60))
    for reads in (1, 2, 3):
        await settle()
        assert (row.reads, waiting.done()) == (reads, False)  # one look for each, and no spinning
        watch._hear(DONE_CHANNEL, "a")
        watch._hear(DONE_CHANNEL, "a")
    assert await asyncio.wait_for(waiting, 20)


async def test_news_wake_only_those_who_follow(watch: JobWatch) -> None:
    with watch.watching("a") as one, watch.watching("a") as other, watch.watching("b") as stranger:
        watch._hear(MOVED_CHANNEL, "x a y")
        assert await one.wait(0) and await other.wait(0) and not await stranger.wait(0)
        assert one.clear() is False  # nothing about an end
        watch._hear(DONE_CHANNEL, "a")
        assert (one.clear(), other.clear()) == (True, True)
    assert not watch._watches and not watch._waiting


def test_forgetting_is_counted(watch: JobWatch) -> None:
    watch.register("a")
    watch.register("a")
    watch.forget("a")
    assert watch.waits("a")
    watch.forget("a")
    watch.forget("a")
    assert not watch.waits("a")


def test_entries_of_both_protocols_read_alike() -> None:
    entry = (b"1-0", {b"t": b"done", b"d": b'{"status":"failed"}'})
    assert _flat([entry]) == _flat([[entry]]) == [entry]
    assert _flat([]) == []
    item = ("1-0", "done", {"status": "failed"})
    assert entries_of({b"key": [[entry]]}) == entries_of([[b"key", [entry]]]) == [item]
    assert entries_of(None) == entries_of({}) == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"t": b"progress"},
        {b"t": b"progress", b"d": b"{"},
        {b"t": b"progress", b"d": b"[]"},
        {b"t": b"progress", b"d": b'{"index": "0"}'},
        {b"t": b"nothing", b"d": b"{}"},
        {b"t": b"\xff", b"d": b"\xff"},
        {b"t": b"done", b"d": b"7"},
        {b"t": b"done", b"d": b"[" * 100_000},
    ],
)
def test_what_no_worker_wrote_is_left_out(fields: dict[bytes, bytes]) -> None:
    assert _decode(b"7-1", fields) == (
        "7-1",
        IGNORED,
        {},
    )  # its id still counts, so that it is not read for ever
