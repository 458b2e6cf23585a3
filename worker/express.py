"""Brings urgent jobs into an engine whose places are all taken by less urgent ones.

Celery's pool has a thread for each of the engine's slots and takes no message while all of them
work. The engine sets less urgent sequences aside between two steps when more urgent ones arrive
(`worker.engine.scheduler`), so these must be brought to it: while every slot is taken and some of
it by less urgent work, a thread takes the messages of the more urgent queues itself and runs them
in threads of its own, as many as there are slots at most.

It pops a message for good, where Celery would keep it until it is acknowledged. Nothing is lost by
that: only the row decides, and one that stays queued is pushed again (`shared.maintenance`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import redis
import structlog

from shared.background import BackgroundThread, Duty
from shared.jobs.status import Priority
from shared.metrics import WORKER_DUTY_FAILURES, WORKER_MESSAGES_DROPPED
from shared.queue.messages import read_message
from shared.queue.names import queue_name
from worker.held import HeldAttempts

LOOK_SECONDS = 0.05  # between looks at what is held
BLOCK_SECONDS = 0.5  # for a message; a slot that comes free meanwhile is as good
_AWAY_SECONDS = 1.0
URGENT = (
    Priority.INTERACTIVE,
    Priority.NORMAL,
)  # the most urgent first; nothing is less urgent than bulk

_log = structlog.get_logger(__name__)


class Express:
    """A thread. `run_job` and `put_back` are the runner's, by a job's id."""

    def __init__(
        self,
        client: redis.Redis,
        held: HeldAttempts,
        run_job: Callable[[str], None],
        put_back: Callable[[str], None],
        *,
        model: str,
        slots: int,
        accepts: Callable[[], bool],
    ) -> None:
        self._redis = client
        self._held = held
        self._run_job = run_job
        self._put_back = put_back
        self._queues = {queue_name(model, priority.value): priority for priority in URGENT}
        self._slots = slots
        self._accepts = accepts
        self._running = 0
        self._lock = threading.Lock()
        duty = Duty(
            "take_urgent",
            self._round,
            every=0.0,
            failures=WORKER_DUTY_FAILURES,
            backoff_max=_AWAY_SECONDS,
        )
        self.thread = BackgroundThread("vdiff-express", [duty], close_seconds=2 * BLOCK_SECONDS)

    def wanted(self) -> list[str]:
        """The queues whose next job would have somebody set aside, the most urgent first."""
        with self._lock:
            if self._running >= self._slots or not self._accepts():
                return []
        held = [attempt.priority for attempt in self._held.all()]
        if len(held) < self._slots:
            return []  # Celery takes it
        return [
            queue
            for queue, priority in self._queues.items()
            if sum(one.rank <= priority.rank for one in held) < self._slots
        ]

    def _round(self) -> float:
        """Take at most one message; return the seconds until the next look."""
        queues = self.wanted()
        if not queues:
            return LOOK_SECONDS
        found: Any = self._redis.brpop(queues, timeout=BLOCK_SECONDS)
        if found is not None:
            self._take(found[1])
        return 0.0

    def _take(self, message: bytes) -> None:
        job_id = read_message(message)
        if job_id is None:
            WORKER_MESSAGES_DROPPED.inc()
            _log.error(
                "message_not_readable"
            )  # its row stays queued, and is pushed again for whoever can read it
            return
        if self.thread.stopping.is_set() or not self._accepts():
            self._put_back(job_id)
            return
        with self._lock:
            self._running += 1
        thread = threading.Thread(
            target=self._run_one, args=(job_id,), name=f"vdiff-express {job_id}", daemon=True
        )
        try:
            thread.start()
        except BaseException:  # no more threads: the row stays queued and is pushed again
            with self._lock:
                self._running -= 1
            raise

    def _run_one(self, job_id: str) -> None:
        try:
            self._run_job(job_id)
        except Exception:
            _log.exception(
                "express_failed_unexpectedly", job_id=job_id
            )  # its lease runs out, and it is tried again
        finally:
            with self._lock:
                self._running -= 1
