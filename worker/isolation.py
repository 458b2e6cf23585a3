"""Runs suspects apart from all other jobs of this worker; a thread in every worker.

A suspect was lost together with a worker, maybe because it killed that worker
(`shared.jobs.suspects`). Nothing that is healthy may run beside it, and it must not keep healthy
jobs waiting for long:

1. A worker without work takes suspects at once. 2. A busy worker waits `PATIENCE_SECONDS` for an
idle one to take them. Then it closes its gate: running jobs go on, new
   ones wait or go to other workers. One busy worker per model does so at a time.
3. When the running jobs are not over in time, the gate opens again; the next try waits twice as
long. 4. The group runs. When it takes longer than its budget while other jobs wait, the gate opens:
from then on the suspects
   do not run alone, which is recorded with the attempt. The budget doubles with every loss of the
   job.
5. After a group the gate stays open for as long as it was closed, if there is other work.

How often a job may die alone is decided where leases expire (`repository.sweep_expired`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Row

from shared.background import BackgroundThread, Duty
from shared.db.retries import persist
from shared.db.session import Database, WriteSession
from shared.jobs import suspects
from shared.jobs.status import Priority
from shared.metrics import WORKER_DUTY_FAILURES
from shared.queue.names import queue_name
from worker.gate import Gate
from worker.runner import Runner

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
CLOSING_SECONDS = 20.0
CLOSING_MAX_SECONDS = 3600.0
BUDGET_SECONDS = 30.0
BUDGET_DOUBLINGS = 10
TOKEN_SECONDS = 30
_STEP_SECONDS = 0.25

_log = structlog.get_logger(__name__)


def token_key(model: str) -> str:
    """The Redis key that a busy worker holds while its gate is closed."""
    return f"vdiff:isolating:{model}"


class Isolation:
    """Args: accepts: False once the worker shuts down."""

    def __init__(
        self,
        database: Database,
        client: redis.Redis,
        runner: Runner,
        gate: Gate,
        *,
        model: str,
        worker_id: str,
        slots: int,
        revision: str | None,
        accepts: Callable[[], bool],
    ) -> None:
        self._database = database
        self._redis = client
        self._runner = runner
        self._gate = gate
        self._model = model
        self._worker_id = worker_id
        self._slots = slots
        self._revision = revision
        self._accepts = accepts
        self._closing_seconds = CLOSING_SECONDS
        self._rest_until = float("-inf")
        self.thread = BackgroundThread(
            "vdiff-isolation",
            [Duty("isolate", self.round, every=LOOK_SECONDS, failures=WORKER_DUTY_FAILURES)],
        )

    def round(self) -> float | None:
        """Look for suspects, and run one group of them; return 0 when the next look should follow
        at once.
        """
        if not self._accepts():
            return None
        waiting = self._waiting()
        if not waiting:
            self._closing_seconds = CLOSING_SECONDS
            return None
        busy = not self._gate.is_empty or self._messages_wait()
        if busy and not self._may_close(waiting):
            return None
        began = time.monotonic()
        ran = False
        self._gate.close()
        try:
            if self._wait_empty(busy):
                self._closing_seconds = CLOSING_SECONDS
                ran = self._run_group()
            else:
                self._closing_seconds = min(2 * self._closing_seconds, CLOSING_MAX_SECONDS)
        finally:
            self._gate.open()
            if busy:
                self._release_token()
            now = time.monotonic()
            self._rest_until = now + (now - began)
        return 0.0 if ran else None

    def _waiting(self) -> Sequence[Row[Any]]:
        statement = suspects.waiting(self._model, revision=self._revision, limit=self._slots)
        with self._database.read() as session:
            return session.execute(statement).all()

    def _messages_wait(self) -> bool:
        """Return whether other jobs wait for a worker of this model; False while Redis is away."""
        try:
            return any(
                self._redis.llen(queue_name(self._model, priority.value)) for priority in Priority
            )
        except (RedisError, OSError):
            return False

    def _may_close(self, waiting: Sequence[Row[Any]]) -> bool:
        if (
            time.monotonic() < self._rest_until
            or max(row.waited for row in waiting) < PATIENCE_SECONDS
        ):
            return False
        try:
            return bool(
                self._redis.set(token_key(self._model), self._worker_id, nx=True, ex=TOKEN_SECONDS)
            )
        except (RedisError, OSError):
            return True  # a hint only: two workers at once cost throughput

    def _keep_token(self) -> None:
        try:
            self._redis.expire(token_key(self._model), TOKEN_SECONDS)
        except (RedisError, OSError):
            return

    def _release_token(self) -> None:
        try:
            self._redis.delete(token_key(self._model))
        except (RedisError, OSError):
            return  # it expires

    def _turn(self, busy: bool) -> None:
        self.thread.turn()
        if busy:
            self._keep_token()

    def _wait_empty(self, busy: bool) -> bool:
        """Wait until nothing runs here; return False when that takes too long or the worker shuts
        down.
        """
        until = time.monotonic() + self._closing_seconds
        while not self._gate.wait_empty(_STEP_SECONDS):
            self._turn(busy)
            if time.monotonic() > until or not self._accepts():
                return False
        return True

    def _run_group(self) -> bool:
        """Claim and run the suspects whose turn it is; return False when there were none."""
        waiting = self._waiting()  # another worker may have taken some meanwhile
        if not waiting or not self._accepts():
            return False
        group = [row for row in waiting if row.isolation >= waiting[0].isolation][
            : waiting[0].isolation
        ]
        alone = len(group) == 1
        began = time.time()
        claims = [
            self._runner.claim(row.id, apart=True, alone=alone, give_up=self._gives_up)
            for row in group
        ]
        jobs = [job for job in claims if job is not None]
        if not jobs:
            return False
        _log.info("suspects_run_apart", jobs=[job.id for job in jobs], alone=alone)
        threads = self._start_all(jobs, began)
        until = time.monotonic() + BUDGET_SECONDS * 2.0 ** min(
            max(job.losses for job in jobs), BUDGET_DOUBLINGS
        )
        while any(thread.is_alive() for thread in threads):
            self._turn(True)
            if time.monotonic() > until and (self._gate.waiting or self._messages_wait()):
                self._let_others_in(jobs)
                break
            for thread in threads:
                thread.join(_STEP_SECONDS / len(threads))
        return bool(threads)

    def _gives_up(self) -> bool:
        self._turn(True)  # PostgreSQL is away, and this thread is well
        return not self._accepts()

    def _start(self, job: Row[Any], began: float) -> threading.Thread:
        self._gate.enter_apart()

        def run() -> None:
            try:
                self._runner.run_claimed(job, began=began)
            except Exception:
                _log.exception("suspect_broke_unexpectedly", job_id=job.id)  # its lease runs out
            finally:
                self._gate.leave()

        thread = threading.Thread(target=run, name=f"vdiff-isolated {job.id}", daemon=True)
        try:
            thread.start()
        except BaseException:
            self._gate.leave()
            raise
        return thread

    def _start_all(self, jobs: Sequence[Row[Any]], began: float) -> list[threading.Thread]:
        """Start a thread for each claimed job. If one does not start, give back the jobs that have
        none.
        """
        threads: list[threading.Thread] = []
        try:
            for job in jobs:
                threads.append(self._start(job, began))
        except (RuntimeError, MemoryError):
            left = jobs[len(threads) :]
            _log.exception("suspects_not_started", jobs=[job.id for job in left])
            self._runner.give_back(left)
        return threads

    def _let_others_in(self, jobs: Sequence[Row[Any]]) -> None:
        def note(session: WriteSession, again: bool) -> None:
            for job in jobs:
                session.execute(suspects.let_others_in((job.id, job.attempt)))

        persist(self._database, note, give_up=self._gives_up)
        _log.info("suspects_run_long", jobs=[job.id for job in jobs])
