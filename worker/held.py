"""The attempts that this process holds right now, and why one of them was told to stop.

Shared by the threads that run jobs, beat, listen for cancels and drain. Whoever stops an attempt
first gives the reason; the thread that runs the job reads it when the engine lets go. Which of two
racing moves wins is decided by the fence in PostgreSQL, never here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from shared.jobs.repository import Pair
from shared.jobs.status import Priority
from shared.jobs.steps import StepLog


class StopReason(Enum):
    CANCELLED = "cancelled"  # somebody asked for it: finish the row as cancelled
    LOST = "lost"  # the lease is somebody else's now: the row is none of our business
    EXPIRED = "expired"  # complete_by or max_run_seconds passed
    DRAINED = "drained"  # given back to the queue: likewise


class Abortable(Protocol):
    def abort(self) -> object: ...


@dataclass(slots=True, eq=False)
class Held:
    """One running attempt."""

    job_id: str
    attempt: int
    priority: Priority = Priority.NORMAL
    progress: dict[str, Any] | None = (
        None  # {tokens_committed, tokens_total, step}; written by the engine's thread
    )
    steps: StepLog | None = None  # what was committed, to be kept with the job; likewise
    reason: StopReason | None = None
    expired: Mapping[str, Any] | None = None  # the error of a deadline that passed
    handle: Abortable | None = None
    ending: bool = False  # its thread records the end
    neighbours: int = (
        1  # the most attempts that ran here at once, this one included, as of its beginning
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pair(self) -> Pair:
        return self.job_id, self.attempt

    def attach(self, handle: Abortable) -> None:
        """The engine has the request now; a stop that came earlier takes effect here."""
        with self._lock:
            self.handle = handle
            stopped = self.reason is not None
        if stopped:
            handle.abort()

    def stop(self, reason: StopReason) -> bool:
        """Abort it in the engine; False when it was stopped before, for whatever reason."""
        with self._lock:
            if self.reason is not None:
                return False
            self.reason = reason
            handle = self.handle
        if handle is not None:
            handle.abort()
        return True


class HeldAttempts:
    """All of them, by job."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._changed = threading.Condition()

    def add(self, job_id: str, attempt: int, priority: Priority = Priority.NORMAL) -> Held:
        """Hold a new attempt. One of the same job that is still here lost its lease without hearing
        of it: it is stopped.
        """
        held = Held(job_id, attempt, priority)
        with self._changed:
            before = self._held.get(job_id)
            self._held[job_id] = held
            for other in self._held.values():
                other.neighbours = max(other.neighbours, len(self._held))
        if before is not None:
            # No heartbeat asks for it any more, so nobody else would; it would keep a slot until
            # its end.
            before.stop(StopReason.LOST)
        return held

    def remove(self, held: Held) -> None:
        with self._changed:
            if self._held.get(held.job_id) is held:
                del self._held[held.job_id]
                self._changed.notify_all()

    def get(self, job_id: str) -> Held | None:
        with self._changed:
            return self._held.get(job_id)

    def all(self) -> list[Held]:
        with self._changed:
            return list(self._held.values())

    def wait_until_empty(self, timeout_seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._held, timeout_seconds)

    def __len__(self) -> int:
        with self._changed:
            return len(self._held)
