"""Progress on its way to Redis: the engine's thread drops events here, another thread writes them in batches.

`put` never blocks and never fails, whatever Redis does. What waits is bounded: when it grows too long (Redis is away)
`denoise` events go first and the `progress` of one choice is merged into one event, so no committed text is lost. A
batch that may or may not have arrived is sent again; `progress.offset` (characters before its text) lets a reader see
both a repetition and a hole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import structlog
from redis.exceptions import RedisError

from shared.events import Event, EventPublisher

BATCH_SECONDS = 0.02
PENDING_MAX = 20_000  # events; above it they are merged
JOBS_PENDING_MAX = 10_000  # jobs with an event waiting; above it the oldest are forgotten (PostgreSQL has their end)
RETRY_SECONDS = 0.5
CLOSE_SECONDS = 2.0

_log = structlog.get_logger(__name__)


class Relay:
    def __init__(self, publisher: EventPublisher) -> None:
        self._publisher = publisher
        self._pending: list[Event] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._merge_above = PENDING_MAX
        self._away = False
        self._thread = threading.Thread(target=self._run, name="vdiff-relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

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
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()
            self._wake.wait(BATCH_SECONDS if not self._away else RETRY_SECONDS)
            self._wake.clear()
            delivered = self._flush()
            if closing:
                return
            if not delivered:
                self._closing.wait(RETRY_SECONDS)

    def _flush(self) -> bool:
        with self._lock:
            batch, self._pending = self._pending, []
        if not batch:
            return True
        try:
            self._publisher.publish(batch)
        except (RedisError, OSError) as exc:
            if not self._away:
                _log.warning("events_delayed", error=str(exc))
            self._away = True
            with self._lock:
                self._pending = batch + self._pending
            return False
        self._away = False
        self._merge_above = PENDING_MAX
        return True


def merge(events: list[Event]) -> list[Event]:
    """As few events as keep the meaning: no `denoise`, one `progress` per choice with all its text."""
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
        merged[key] = Event(event.job_id, event.type, data)
    jobs = list(dict.fromkeys(event.job_id for event in merged.values()))
    forgotten = set(jobs[: max(0, len(jobs) - JOBS_PENDING_MAX)])
    return [event for event in merged.values() if event.job_id not in forgotten]
