"""Progress on its way to Redis: the engine's thread drops events here, another thread writes them
in batches.

`put` never blocks and never fails, whatever Redis does. What waits is bounded: when it grows too
long (Redis is away) `denoise` events go first and the `progress` of one choice is merged into one
event, so no committed text is lost. A batch that may or may not have arrived is sent again;
`progress.offset` (characters before its text) lets a reader see both a repetition and a hole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from shared.background import BackgroundThread, Duty
from shared.events import Event, EventPublisher
from shared.metrics import WORKER_DUTY_FAILURES

BATCH_SECONDS = 0.02
PENDING_MAX = 20_000  # events; above it they are merged
# jobs with an event waiting; above it the oldest are forgotten (PostgreSQL has their end)
JOBS_PENDING_MAX = 10_000
RETRY_SECONDS = 0.5
CLOSE_SECONDS = 2.0


class Relay:
    def __init__(self, publisher: EventPublisher) -> None:
        self._publisher = publisher
        self._pending: list[Event] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._merge_above = PENDING_MAX
        duty = Duty(
            "relay_events",
            self._round,
            every=0.0,
            failures=WORKER_DUTY_FAILURES,
            backoff_max=RETRY_SECONDS,
        )
        self.thread = BackgroundThread("vdiff-relay", [duty], close_seconds=CLOSE_SECONDS)

    def put(self, event: Event) -> None:
        with self._lock:
            self._pending.append(event)
            if len(self._pending) > self._merge_above:
                self._pending = merge(self._pending)
                # Merging that frees little must not be repeated at every event.
                self._merge_above = max(PENDING_MAX, 2 * len(self._pending))
        if event.type == "done":
            self._wake.set()  # somebody waits for it: do not sit out the batch

    def close(self) -> None:
        """Write what is left, for a bounded time."""
        self.thread.stopping.set()
        self._wake.set()
        self.thread.close()
        with suppress(RedisError, OSError):
            self.flush()

    def _round(self) -> None:
        self._wake.wait(BATCH_SECONDS)
        self._wake.clear()
        self.flush()

    def flush(self) -> None:
        """Publish what is pending. Raises redis.RedisError: it stays pending.

        Events that cannot be published for what they are would hold up all others: they are
        dropped.
        """
        with self._lock:
            batch, self._pending = self._pending, []
        if not batch:
            return
        try:
            self._publisher.publish(batch)
        except (RedisError, OSError):
            with self._lock:
                self._pending = batch + self._pending
            raise
        self._merge_above = PENDING_MAX


def merge(events: list[Event]) -> list[Event]:
    """Merge events without loss of meaning: no `denoise`, one `progress` per choice with all its
    text.
    """
    merged: OrderedDict[tuple[Any, ...], Event] = OrderedDict()
    for event in events:
        if event.type == "denoise":
            continue
        data = event.data
        key = (event.job_id, event.type, data.get("attempt"), data.get("index"))
        before = merged.pop(key, None)
        if before is not None and event.type == "progress":
            offset = before.data.get("offset", 0)
            data = {**data, "text": before.data["text"] + data["text"], "offset": offset}
            if "canvas_change" in data:  # it is of the frame that is merged away
                data = {k: v for k, v in data.items() if k not in ("canvas_change", "frame")}
                data |= {k: before.data[k] for k in ("canvas", "frame") if "canvas" in before.data}
        merged[key] = Event(event.job_id, event.type, data, event.tenant)
    jobs = list(dict.fromkeys(event.job_id for event in merged.values()))
    forgotten = set(jobs[: max(0, len(jobs) - JOBS_PENDING_MAX)])
    return [event for event in merged.values() if event.job_id not in forgotten]
