"""The dispatcher's statements: with suspects and pushed jobs before ordinary ones, and with nothing
to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event, insert, text

from shared.db.explain import explain
from shared.db.session import AsyncDatabase
from shared.jobs import lanes, suspects
from shared.jobs.estimate import queue_position
from shared.jobs.repository import JOBS
from shared.jobs.status import Priority
from shared.queue.names import queue_name
from shared.queue.window import WINDOW_SECONDS, backlog_key
from tests.integration.conftest import Jobs
from tests.integration.test_dispatch import add, window
from worker.dispatcher import IDLE_LOOK_SECONDS, LOOK_SECONDS, Dispatcher

pytestmark = pytest.mark.integration
SLOTS = 8
LANES = 50 * SLOTS  # many times what a round takes


class Time:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def dispatcher(jobs: Jobs, clock: Time | None = None) -> Dispatcher:
    clock = clock or Time()
    return Dispatcher(
        jobs.database, jobs.redis, model=jobs.model, slots=SLOTS, stale_seconds=30, clock=clock
    )


def add_lanes(jobs: Jobs, **columns: Any) -> None:
    """Queue two jobs in each of many lanes, all of which come before a tenant named z."""
    row = {
        "endpoint": "/v1/completions",
        "model": jobs.model,
        "body": {},
        "params": {},
        "prompt_token_ids": [5],
        "tokens": 5,
        "priority": "normal",
        **columns,
    }
    with jobs.database.write() as session:
        session.execute(
            insert(JOBS),
            [
                {"id": f"{jobs.model}-{i:06}", "tenant": f"a{i % LANES}", **row}
                for i in range(2 * LANES)
            ],
        )


@contextmanager
def statements(jobs: Jobs) -> Iterator[list[str]]:
    """Collect the SQL that this process sends meanwhile."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        sent.append(sql)

    event.listen(jobs.database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(jobs.database.engine, "before_cursor_execute", note)


@pytest.mark.parametrize(
    "columns", [{"isolation": 1}, {"pushed_at": datetime.now(UTC)}], ids=["suspects", "pushed"]
)
def test_lanes_without_a_job_to_push_hide_no_other(jobs: Jobs, columns: dict[str, Any]) -> None:
    add_lanes(jobs, **columns)
    ordinary = add(jobs, "z", 3)
    assert dispatcher(jobs).dispatch() == 3
    assert window(jobs) == ordinary


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def test_a_round_reads_no_suspect(jobs: Jobs) -> None:
    """Each lane in the way costs one look into an index that has no entry of it."""
    add_lanes(jobs, isolation=1)
    add(jobs, "z", 1000)
    with jobs.database.write() as session:
        session.execute(lanes.roll_up())
    with jobs.database.write() as session:
        session.execute(text("ANALYZE jobs, lanes"))
    statement = lanes.candidates(jobs.model, "normal", clock=0.0, lanes=SLOTS, per_lane=SLOTS)
    for asked in (statement, lanes.unpushed(jobs.model)):
        with jobs.database.read() as session:
            plan = explain(session, asked, "ANALYZE, FORMAT JSON")[0]
        found = json.loads(plan) if isinstance(plan, str) else plan
        read = [node for node in _nodes(found[0]["Plan"]) if node.get("Relation Name") == "jobs"]
        assert read and {node.get("Index Name") for node in read} == {"ix_jobs_unpushed"}, found
        assert not any(node.get("Rows Removed by Filter", 0) for node in read)
        assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) <= 2 * SLOTS


async def test_places_are_counted_without_suspects(jobs: Jobs) -> None:
    """A suspect takes no turn; its own place is among suspects, the more urgent first."""
    apart = add(jobs, "z", 2, isolation=1)
    urgent = add(jobs, "y", 3, isolation=1, priority="interactive")
    add(jobs, "y", 1)
    mine = add(jobs, "z", 2)
    database = AsyncDatabase(jobs.database_url)
    try:
        async with database.read() as session:
            places = {
                i: await queue_position(session, jobs.row(i)._mapping)
                for i in (*mine, *apart, *urgent)
            }
    finally:
        await database.dispose()
    assert [places[i] for i in mine] == [2, 3]  # behind the turn of `y`, and the job before it
    assert sorted(places[i] for i in urgent) == [1, 2, 3]
    assert sorted(places[i] for i in apart) == [4, 5]
    counted = {
        (row.priority, row.tenant): row.jobs for row in jobs.execute(suspects.per_lane(jobs.model))
    }
    assert counted == {("normal", "z"): 2, ("interactive", "y"): 3}


def test_an_idle_dispatcher_looks_less_often(jobs: Jobs) -> None:
    """Ten minutes of its clock: one statement a look, a look each three to four seconds."""
    clock = Time()
    one = dispatcher(jobs, clock)
    for _ in range(5):
        one.dispatch()
        clock.now += one.wait_seconds()
    began, looks = clock.now, 0
    with statements(jobs) as sent:
        while clock.now < began + 600:
            before = clock.now
            assert one.dispatch() == 0
            clock.now += one.wait_seconds()
            assert 0.7 * IDLE_LOOK_SECONDS < clock.now - before <= IDLE_LOOK_SECONDS
            looks += 1
    measured = [sql for sql in sent if "FROM workers" in sql]
    assert (
        600 / WINDOW_SECONDS <= len(measured) <= 4 * 600 / WINDOW_SECONDS
    )  # the size in Redis does not expire
    assert len(sent) - len(measured) == looks <= 200 + 1
    assert not any("FOR UPDATE" in sql for sql in sent)


@pytest.mark.parametrize("sign", ["told", "claimed", "message", "row"])
def test_any_sign_of_work_makes_it_look_often_again(jobs: Jobs, sign: str) -> None:
    clock = Time()
    one = dispatcher(jobs, clock)
    for _ in range(6):
        one.dispatch()
        clock.now += one.wait_seconds()
    if sign == "told":
        clock.now -= 1.0  # before its time
        one.dispatch()
        assert one.wait_seconds() > LOOK_SECONDS  # not its time
        one.told(jobs.model)
    elif sign == "claimed":
        one.claimed()
    elif sign == "message":
        jobs.redis.lpush(queue_name(jobs.model, "bulk"), "x")
    else:
        add(jobs, "a", 1)
    with statements(jobs) as sent:
        assert one.dispatch() == (sign == "row")
    assert sent
    assert one.wait_seconds() <= LOOK_SECONDS


def test_a_job_without_a_message_is_found_by_a_dispatcher_that_nobody_wakes(jobs: Jobs) -> None:
    clock = Time()
    one = dispatcher(jobs, clock)
    for _ in range(6):
        one.dispatch()
        clock.now += one.wait_seconds()
    one.dispatch()
    ids = add(jobs, "a", 1)
    assert one.dispatch() == 0 and window(jobs) == []
    clock.now += IDLE_LOOK_SECONDS
    assert one.dispatch() == 1 and window(jobs) == ids


def test_a_look_that_finds_nothing_lets_the_api_push_again(jobs: Jobs) -> None:
    clock = Time()
    one = dispatcher(jobs, clock)
    ids = add(jobs, "a", SLOTS + 1)
    assert one.dispatch() == SLOTS
    assert jobs.redis.exists(backlog_key(queue_name(jobs.model, "normal")))
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET pushed_at = now() WHERE id = :id"), {"id": ids[-1]})
    jobs.redis.delete(queue_name(jobs.model, "normal"))
    clock.now += LOOK_SECONDS
    assert one.dispatch() == 0
    assert not jobs.redis.exists(backlog_key(queue_name(jobs.model, "normal")))
    assert not any(one._backlog[priority] for priority in Priority)


def test_changes_of_jobs_that_the_api_pushes_are_summed_up(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to dispatch then, and the next round of maintenance may be far."""
    monkeypatch.setattr(lanes, "ROLLUP_FROM", 10)
    clock = Time()
    one = dispatcher(jobs, clock)
    for n in range(12):
        add(jobs, f"t{n}", 1, pushed_at=datetime.now(UTC))
    assert one.dispatch() == 0
    with jobs.database.read() as session:
        assert session.execute(text("SELECT count(*) FROM lane_deltas")).scalar_one() == 0
