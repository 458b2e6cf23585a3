"""Keeps Redis's window of this worker's model filled from PostgreSQL, keys in turns; a thread in every worker.

A round looks at the three queues of the model; one that is down to half its window is filled up: lock its row in
`queues` (so one process at a time), take the first jobs of the lanes whose turn it is, COMMIT, push. It is woken by a
claim (a message left the window) and by the API (a job was left in PostgreSQL), and looks anyway every `LOOK_SECONDS`,
so that nothing depends on a message of Redis.
"""

from __future__ import annotations

import threading
import time
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

LOOK_SECONDS = 0.5  # how late a job may be noticed that nobody told of
WINDOW_EVERY_SECONDS = 2.0  # how often the workers' slots are counted


class Dispatcher:
    def __init__(
        self, database: Database, client: redis.Redis, *, model: str, slots: int, stale_seconds: float
    ) -> None:
        self._database = database
        self._redis = client
        self._model = model
        self._slots = slots
        self._stale_seconds = stale_seconds
        self._window = max(slots, MIN_WINDOW)
        self._window_at = float("-inf")
        self._looked_at = float("-inf")
        self._backlog = dict.fromkeys(Priority, True)  # whether jobs may wait in PostgreSQL
        self._told = False
        self._wake = threading.Event()
        duty = Duty("dispatch", self._round, every=0.0, failures=WORKER_DUTY_FAILURES, backoff_max=LOOK_SECONDS)
        self.thread = BackgroundThread("vdiff-dispatcher", [duty])

    def close(self) -> None:
        self.thread.stopping.set()
        self._wake.set()
        self.thread.close()

    def claimed(self) -> None:
        """A message left the window."""
        if any(self._backlog.values()):
            self._wake.set()

    def told(self, model: str) -> None:
        """The API left a job in PostgreSQL."""
        if model == self._model:
            self._told = True
            self._wake.set()

    def _round(self) -> None:
        self._wake.wait(LOOK_SECONDS)
        self._wake.clear()
        if not self.thread.stopping.is_set():
            self.dispatch()

    def dispatch(self) -> int:
        """One round; how many jobs were pushed."""
        self._measure_window()
        told, self._told = self._told, False
        look = told or time.monotonic() - self._looked_at >= LOOK_SECONDS
        if look:
            self._looked_at = time.monotonic()
        pipe = self._redis.pipeline(transaction=False)
        for priority in Priority:
            pipe.llen(queue_name(self._model, priority.value))
        pushed = 0
        for priority, length in zip(Priority, pipe.execute(), strict=True):
            if (look or self._backlog[priority]) and length <= self._window // 2:
                pushed += self._fill(priority, self._window - length)
        return pushed

    def _measure_window(self) -> None:
        if time.monotonic() - self._window_at < WINDOW_EVERY_SECONDS:
            return
        with self._database.read() as session:
            live = session.execute(serving.live_workers(stale_seconds=self._stale_seconds, model=self._model)).all()
        self._window = max(sum(row.slots for row in live), self._slots, MIN_WINDOW)
        self._redis.set(window_key(self._model), self._window, ex=WINDOW_SECONDS)
        self._window_at = time.monotonic()

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
            # Lanes whose jobs all have their message already take up places; there are at most a window of them.
            found = session.execute(
                lanes.candidates(model, name, clock=clock, lanes=2 * self._window, per_lane=room)
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
        for who, rows in ((who, list(group)) for who, group in groupby(found, key=lambda row: (row.tenant, row.key_id)))
    ]
