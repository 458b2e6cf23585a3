"""One thread that keeps this worker's leases alive, and stores what the worker is doing.

Each round is one statement for all held attempts: it renews, stores progress, and brings back who
was cancelled. A row that does not come back is lost and its attempt is aborted. Leases are renewed
only while the engine makes steps: a hung engine loses them, and the process ends so that its
supervisor starts a new one.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import structlog

from shared import liveness, serving
from shared.background import BackgroundThread, Duty
from shared.db.session import Database
from shared.jobs import lease_clock, repository
from shared.metrics import WORKER_DUTY_FAILURES
from worker.engine.state import HealthStatus
from worker.held import HeldAttempts, StopReason

RETRY_SECONDS = 1.0  # after a heartbeat that failed

_log = structlog.get_logger(__name__)


class EngineVitals(Protocol):
    @property
    def has_work(self) -> bool: ...
    @property
    def steps_total(self) -> int: ...
    def get_health(self) -> HealthStatus: ...


class HangDetector:
    """Detection of an engine loop that is dead, or that has work and took no step for
    `hang_seconds`.
    """

    def __init__(
        self,
        engine: EngineVitals,
        hang_seconds: float,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._hang_seconds = hang_seconds
        self._now = now
        self._steps = engine.steps_total
        self._moved_at = now()

    def is_hung(self) -> bool:
        if not self._engine.get_health().healthy:
            return True
        steps = self._engine.steps_total
        if steps != self._steps or not self._engine.has_work:
            self._steps = steps
            self._moved_at = self._now()
            return False
        return self._now() - self._moved_at > self._hang_seconds


class Heartbeat:
    def __init__(
        self,
        database: Database,
        held: HeldAttempts,
        *,
        worker_id: str,
        lease_seconds: float,
        heartbeat_seconds: float,
        hang: HangDetector,
        on_hang: Callable[[], None],
        stats: Callable[[], Mapping[str, Any]],
        state: Callable[[], serving.WorkerState],
        silent: Callable[[float], list[str]] = lambda seconds: [],
    ) -> None:
        self._database = database
        self._held = held
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._seconds = heartbeat_seconds
        self._hang = hang
        self._on_hang = on_hang
        self._stats = stats
        self._state = state
        self._silent = silent
        self._latest: Mapping[str, Any] = {}
        duties = (self.show_liveness, self.check_engine, self.collect_stats, self.beat, self.pulse)
        self.thread = BackgroundThread(
            "vdiff-heartbeat",
            [
                # No back-off: leases are renewed as soon as they can be.
                Duty(
                    duty.__name__,
                    duty,
                    every=heartbeat_seconds,
                    failures=WORKER_DUTY_FAILURES,
                    retry=min(RETRY_SECONDS, heartbeat_seconds / 4),
                )
                for duty in duties
            ],
            close_seconds=heartbeat_seconds,
        )

    def show_liveness(self) -> None:
        """Touch the file of the liveness probe, unless a thread of this worker is silent."""
        if silent := self._silent(liveness.stale_seconds(self._seconds)):
            _log.error("threads_silent", threads=silent)
        else:
            liveness.turn("worker")

    def check_engine(self) -> None:
        """End the process when its engine hangs: leases must not be renewed for it."""
        if self._hang.is_hung():
            _log.critical("engine_hung", held=len(self._held))
            self._on_hang()

    def collect_stats(self) -> None:
        """Read the statistics that the next heartbeat stores."""
        self._latest = self._stats()

    def pulse(self) -> None:
        """Note that leases can be renewed, for whoever takes jobs from dead workers."""
        with self._database.write() as session:
            session.execute(lease_clock.pulse(lease_seconds=self._lease_seconds))

    def beat(self) -> None:
        """One round."""
        held = {h.pair: h for h in self._held.all()}
        with self._database.write() as session:
            session.execute(serving.beat(self._worker_id, state=self._state(), stats=self._latest))
            if not held:
                return
            statement = repository.heartbeat(
                {pair: h.progress for pair, h in held.items()}, lease_seconds=self._lease_seconds
            )
            rows = session.execute(statement).all()
        renewed = {(row.id, row.attempt): row.cancel_requested for row in rows}
        for pair, attempt in held.items():
            if self._held.get(attempt.job_id) is not attempt:
                continue  # finished meanwhile
            if pair not in renewed:
                if attempt.stop(StopReason.LOST):
                    _log.warning("lease_lost", job_id=attempt.job_id, attempt=attempt.attempt)
            elif renewed[pair]:
                attempt.stop(StopReason.CANCELLED)


def memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
