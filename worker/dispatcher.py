"""Keeps Redis's window of this worker's model filled from PostgreSQL, keys in turns; a thread in
every worker.

A round fills up the queues of the model that are down to half their window: it locks the queue's
row in `queues` (so one process at a time), takes the first jobs of the lanes whose turn it is,
commits and pushes. A claim (a message left the window) and the API (it left a job in PostgreSQL)
wake the dispatcher.

The dispatcher also looks into PostgreSQL unasked, so that nothing depends on a message of Redis:
one statement says for all three queues whether a job waits there. It looks every `LOOK_SECONDS`
while there is work. Looks that find nothing take twice as long each, up to `IDLE_LOOK_SECONDS`,
until the next sign of work: a claim, a message of the API, a message in a queue, a job without one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import redis
from redis.exceptions import RedisError
from sqlalchemy import Row

from shared import serving
from shared.background import BackgroundThread, Duty
from shared.db.session import Database
from shared.jobs import lanes
from shared.jobs.status import Priority
from shared.jobs.turns import LaneView, take_turns
from shared.metrics import WORKER_DUTY_FAILURES
from shared.queue.messages import push_sync
from shared.queue.names import queue_name
from shared.queue.window import BACKLOG_SECONDS, MIN_WINDOW, WINDOW_SECONDS, backlog_key, window_key

LOOK_SECONDS = 0.5  # how late a busy worker notices a job if the API's message was lost
IDLE_LOOK_SECONDS = 4.0  # how late an idle one does
WINDOW_EVERY_SECONDS = 2.0  # how often the workers' slots are counted
WINDOW_IDLE_SECONDS = (
    WINDOW_SECONDS / 3
)  # by an idle worker, for the API: before the size expires in Redis


class Dispatcher:
    def __init__(
        self,
        database: Database,
        client: redis.Redis,
        *,
        model: str,
        slots: int,
        stale_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._redis = client
        self._model = model
        self._slots = slots
        self._stale_seconds = stale_seconds
        self._clock = clock
        self._window = max(slots, MIN_WINDOW)
        self._window_at = float("-inf")
        self._look_seconds = LOOK_SECONDS  # between the last look and the next
        self._look_at = float("-inf")
        self._backlog = dict.fromkeys(Priority, True)  # whether jobs may wait in PostgreSQL
        self._told = self._claimed = False
        self._wake = threading.Event()
        duty = Duty(
            "dispatch",
            self._round,
            every=0.0,
            failures=WORKER_DUTY_FAILURES,
            backoff_max=LOOK_SECONDS,
        )
        self.thread = BackgroundThread("vdiff-dispatcher", [duty])

    def close(self) -> None:
        self.thread.stopping.set()
        self._wake.set()
        self.thread.close()

    def claimed(self) -> None:
        """Note that a message left the window."""
        self._claimed = True
        if any(self._backlog.values()) or self._look_seconds > LOOK_SECONDS:
            self._wake.set()

    def told(self, model: str) -> None:
        """Note that the API left a job in PostgreSQL."""
        if model == self._model:
            self._told = True
            self._wake.set()

    def wait_seconds(self) -> float:
        """Return the time until the next look."""
        return min(max(0.0, self._look_at - self._clock()), IDLE_LOOK_SECONDS)

    def _round(self) -> None:
        self._wake.wait(self.wait_seconds())
        self._wake.clear()
        if not self.thread.stopping.is_set():
            self.dispatch()

    def dispatch(self) -> int:
        """Do one round; return how many jobs were pushed."""
        told, self._told = self._told, False
        claimed, self._claimed = self._claimed, False
        if told or claimed:
            self._look_seconds = LOOK_SECONDS
        self._measure_window()
        look = told or self._clock() >= self._look_at
        if look:
            self._look_at = self._clock() + LOOK_SECONDS
        pipe = self._redis.pipeline(transaction=False)
        for priority in Priority:
            pipe.llen(queue_name(self._model, priority.value))
        lengths = dict(zip(Priority, pipe.execute(), strict=True))
        room = [priority for priority, length in lengths.items() if length <= self._window // 2]
        if look:
            found = self._look(room)
            self._plan(idle=not (told or claimed or found or any(lengths.values())))
        return sum(
            self._fill(one, self._window - lengths[one]) for one in room if self._backlog[one]
        )

    def _look(self, room: Sequence[Priority]) -> bool:
        """Note which queues with room have a job that waits in PostgreSQL; return whether one has."""
        if not room:
            return False
        with self._database.read() as session:
            waits = session.execute(lanes.unpushed(self._model)).one()._mapping
        for priority in room:
            if self._backlog[priority] and not waits[priority.value]:
                self._redis.delete(backlog_key(queue_name(self._model, priority.value)))
            self._backlog[priority] = waits[priority.value]
        found = any(waits[priority.value] for priority in room)
        if waits["changes"] and not found:  # `_take` does it too
            with self._database.write() as session:
                session.execute(lanes.roll_up())
        return found

    def _plan(self, *, idle: bool) -> None:
        """Choose the time of the next look; the workers of a model do not look at the same moment."""
        self._look_seconds = (
            min(2 * self._look_seconds, IDLE_LOOK_SECONDS) if idle else LOOK_SECONDS
        )
        self._look_at = self._clock() + self._look_seconds * random.uniform(0.75, 1.0)

    def _measure_window(self) -> None:
        every = WINDOW_EVERY_SECONDS if self._look_seconds <= LOOK_SECONDS else WINDOW_IDLE_SECONDS
        if self._clock() - self._window_at < every:
            return
        with self._database.read() as session:
            slots = session.execute(
                serving.live_slots(self._model, stale_seconds=self._stale_seconds)
            ).scalar_one()
        self._window = max(slots, self._slots, MIN_WINDOW)
        self._redis.set(window_key(self._model), self._window, ex=WINDOW_SECONDS)
        self._window_at = self._clock()

    def _fill(self, priority: Priority, room: int) -> int:
        queue = queue_name(self._model, priority.value)
        taken = self._take(priority, room)
        if taken is None:
            return 0  # another process is at it
        more = len(taken) >= room
        self._backlog[priority] = more
        if taken:
            try:
                push_sync(self._redis, [(job_id, self._model, priority.value) for job_id in taken])
            except (RedisError, OSError):
                with self._database.write() as session:
                    session.execute(lanes.untake(taken))
                raise
        if more:
            self._redis.set(backlog_key(queue), 1, ex=BACKLOG_SECONDS)
        else:
            self._redis.delete(backlog_key(queue))
        return len(taken)

    def _take(self, priority: Priority, room: int) -> list[str] | None:
        """The jobs whose turn it is, marked as pushed; None when the queue is locked."""
        model, name = self._model, priority.value
        with self._database.write() as session:
            clock = session.execute(lanes.lock_queue(model, name)).scalar_one_or_none()
            if clock is None:
                session.execute(lanes.ensure_queue(model, name))
                clock = session.execute(lanes.lock_queue(model, name)).scalar_one_or_none()
                if clock is None:
                    return None
            session.execute(lanes.roll_up())
            # Each of the lanes has a job for this round, so the first `room` of them have all turns
            # of the round.
            found = session.execute(
                lanes.candidates(model, name, clock=clock, lanes=room, per_lane=room)
            ).all()
            turns = take_turns(_views(found), clock, room)
            if not turns.jobs:
                return []
            kept = {row.id for row in session.execute(lanes.take(turns.jobs))}
            session.execute(lanes.set_clocks(model, name, turns.lane_clocks))
            session.execute(lanes.set_queue_clock(model, name, turns.clock))
        return [job_id for job_id in turns.jobs if job_id in kept]


def _views(found: list[Row[Any]] | Any) -> list[LaneView]:
    return [
        LaneView(who, rows[0].clock, rows[0].weight, [row.id for row in rows])
        for who, rows in (
            (who, list(group))
            for who, group in groupby(found, key=lambda row: (row.tenant, row.key_id))
        )
    ]
