"""Shutting down in good order.

    SIGTERM, SIGINT   take no new jobs; running ones go on for up to `drain_seconds`; what is left
                      goes back to the queue (fenced, no failure counted, pushed again) and the
                      process exits 0
    a second signal   gives back at once
    a thread is gone  `fail`: gives back at once and exits with `EXIT_THREAD_GONE`

Celery with the threads pool cannot do this: its warm shutdown stops consuming and then waits for
the pool's threads without an end. So its shutdown is started here, by its own flag, and the drain
beside it makes those threads return.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import redis
import structlog
from celery.worker import state as celery_state
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from shared.background import EXIT_THREAD_GONE
from shared.db.retries import persist
from shared.db.session import Database
from shared.jobs import repository
from shared.queue.repush import push_again
from worker.held import HeldAttempts, StopReason

EXIT_OK = 0
EXIT_HUNG = 70  # EX_SOFTWARE: the supervisor starts a new process
FAIL_SECONDS = 20.0  # from the end of a thread to the end of the process, at most
_GIVE_BACK_SECONDS = 3.0  # for a PostgreSQL that is away
_GIVE_UP_SECONDS = 1.0
_CELERY_STOP_SECONDS = (
    5.0  # from an empty pool to the end of Celery's shutdown, before the process ends regardless
)

_log = structlog.get_logger(__name__)


class Lifecycle:
    def __init__(
        self,
        database: Database,
        client: redis.Redis,
        held: HeldAttempts,
        *,
        drain_seconds: float,
        on_draining: Callable[[], None],
    ) -> None:
        self._database = database
        self._redis = client
        self._held = held
        self._drain_seconds = drain_seconds
        self._on_draining = on_draining
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._drained = threading.Event()
        self._given_up = threading.Event()
        self._signals = 0
        self.exit_code = EXIT_OK

    @property
    def draining(self) -> bool:
        return self._signals > 0

    @property
    def given_up(self) -> bool:
        """Ends that could not be recorded until now are not waited for any more."""
        return self._given_up.is_set()

    def install_signals(self) -> None:
        """Main thread only."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        threading.Thread(target=self._main, name="vdiff-drain", daemon=True).start()

    def fail(self, reason: str) -> None:
        """End the process with a non-zero code: give back what runs at once, and exit even if
        something hangs.

        Any thread may call it, also one that is about to end.
        """
        if self.draining:
            return
        self.exit_code = EXIT_THREAD_GONE
        _log.critical("worker_fails", reason=reason, exit_code=EXIT_THREAD_GONE)
        print(f"vdiff worker: {reason}; the process ends", file=sys.stderr, flush=True)
        last_resort = threading.Timer(FAIL_SECONDS, exit_now, (EXIT_THREAD_GONE,))
        last_resort.daemon = True
        last_resort.start()
        self._hurry.set()
        self._on_signal(0, None)

    def wait_drained(self, timeout_seconds: float) -> bool:
        return self._drained.wait(timeout_seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Runs between two bytecodes of the main thread: set flags, nothing that takes a lock
        # somebody may hold.
        self._signals += 1
        celery_state.should_stop = EXIT_OK  # type: ignore[assignment]  # its stubs know only None
        if self._signals > 1:
            self._hurry.set()
        self._stopping.set()

    def _main(self) -> None:
        self._stopping.wait()
        try:
            self._drain()
        except Exception:
            # The consumer waits for the pool's threads, which nothing would make return.
            _log.exception("drain_broke")
            exit_now(EXIT_THREAD_GONE)

    def _drain(self) -> None:
        _log.info("draining", held=len(self._held), drain_seconds=self._drain_seconds)
        self._on_draining()
        self._wait_for_jobs()
        self._give_back()
        self._held.wait_until_empty(_CELERY_STOP_SECONDS)
        self._given_up.set()
        self._held.wait_until_empty(_GIVE_UP_SECONDS)
        self._drained.set()

    def _wait_for_jobs(self) -> None:
        waited = 0.0
        while waited < self._drain_seconds and not self._hurry.is_set():
            step = min(0.1, self._drain_seconds - waited)
            if self._held.wait_until_empty(step):
                return
            waited += step

    def _give_back(self) -> None:
        # An attempt whose end is being recorded has a result: it may still be stored.
        left = [held for held in self._held.all() if held.reason is None and not held.ending]
        if not left:
            return
        try:
            statement = repository.drain([held.pair for held in left])
            until = time.monotonic() + _GIVE_BACK_SECONDS
            moved = persist(
                self._database,
                lambda session, again: session.execute(statement).all(),
                give_up=lambda: time.monotonic() > until,
            )
        except (SQLAlchemyError, OSError) as exc:
            # Their leases run out, and a sweeper takes them.
            _log.error("drain_failed", error=type(exc).__name__, held=len(left))
            return
        given_back = {row.id for row in moved}
        for held in left:
            if held.job_id in given_back:
                held.stop(StopReason.DRAINED)
        _log.info("given_back", count=len(moved))
        try:
            push_again(self._database, self._redis, moved)
        except (RedisError, OSError, SQLAlchemyError) as exc:
            _log.warning("push_failed", error=type(exc).__name__)  # a sweeper does it


def exit_now(code: int) -> None:
    """End the process although threads hang; nothing that they hold would ever be given back."""
    os._exit(code)
