"""Background loops that no exception ends: duties, the threads that run them, and the group of a
process.

    Duty               one thing to do again and again; its failures are logged once per streak,
                       counted and backed off
    BackgroundThread   runs its duties in turn; one that fails does not keep the others from their
                       turn
    BackgroundThreads  all threads of a process: starts and closes them, knows which are silent,
                       hears of one that ended

asyncio tasks use `Duty.failed` and `Duty.succeeded` in their own loop, and `watch_task` to hear of
their end. A thread or a task that ends although nobody closed it calls `on_gone`; the process then
exits with `EXIT_THREAD_GONE`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

EXIT_THREAD_GONE = (
    71  # EX_OSERR: a thread or task of the process ended; a supervisor starts a new process
)
BACKOFF_MAX_SECONDS = 5.0  # an outage that is over must be noticed soon
STEP_SECONDS = (
    30.0  # the longest sleep of a thread, so that one whose duties are rare does not look silent
)
BACKOFF_FIRST_SECONDS = 0.5
CLOSE_SECONDS = 2.0

_log = structlog.get_logger(__name__)
OnGone = Callable[[str], None]


def describe_error(exc: BaseException) -> str:
    """Return what may be logged of an exception: SQLAlchemy's text would quote the statement and
    its parameters.
    """
    if isinstance(exc, DBAPIError):
        lines = str(exc.orig).strip().splitlines()
        return lines[0] if lines else type(exc.orig).__name__
    return (
        type(exc).__name__ if isinstance(exc, SQLAlchemyError) else f"{type(exc).__name__}: {exc}"
    )


class Duty:
    """One repeated piece of work of a background loop.

    Args:
        name: appears in logs and as the label `duty` of `failures`.
        run: does one round. It may return the seconds until the next one; None means `every`.
        every: seconds from the end of a round to the start of the next.
        failures: counter with the label `duty`.
        backoff_max: the longest pause after failures in a row; never shorter than `every`.
        retry: seconds from a failed round to the next; None backs off.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], float | None],
        *,
        every: float,
        failures: Counter | None = None,
        backoff_max: float = BACKOFF_MAX_SECONDS,
        retry: float | None = None,
    ) -> None:
        self.name = name
        self.every = every
        self.streak = 0  # failures in a row
        self.due_at = float("-inf")
        self._run = run
        self._failures = failures
        self._backoff_max = backoff_max
        self._retry = retry
        if failures is not None:
            failures.labels(duty=name)  # the series begins at 0

    def is_due(self) -> bool:
        return self.due_at <= time.monotonic()

    def perform(self) -> None:
        """Run one round and plan the next. Every `Exception` is handled here."""
        pause: float | None
        try:
            pause = self._run()
        except Exception as exc:
            pause = self.failed(exc)
        else:
            self.succeeded()
        self.due_at = time.monotonic() + (self.every if pause is None else pause)

    def failed(self, exc: Exception) -> float:
        """Count and log a failed round; return the seconds to wait before the next."""
        self.streak += 1
        if self._failures is not None:
            self._failures.labels(duty=self.name).inc()
        if self.streak == 1:
            if isinstance(exc, SQLAlchemyError | RedisError | OSError):
                _log.warning("duty_failed", duty=self.name, error=describe_error(exc))
            else:
                _log.exception("duty_failed_unexpectedly", duty=self.name)
        if self._retry is not None:
            return self._retry
        return max(
            self.every,
            min(BACKOFF_FIRST_SECONDS * 2.0 ** min(self.streak - 1, 10), self._backoff_max),
        )

    def succeeded(self) -> None:
        """Note a round without a failure."""
        if self.streak:
            _log.info("duty_recovered", duty=self.name, failures=self.streak)
            self.streak = 0


class Pulse:
    """A loop that says of itself that it turns; `BackgroundThreads` watches it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turned_at = time.monotonic()
        self.stopping = threading.Event()

    def turn(self) -> None:
        """Note that the loop still turns; a duty that waits long by design calls it too."""
        self.turned_at = time.monotonic()

    def silent_seconds(self) -> float:
        """Return for how long the loop has not turned."""
        return time.monotonic() - self.turned_at

    def is_alive(self) -> bool:
        return True


class BackgroundThread(Pulse):
    """A named daemon thread that performs its duties, in the order given, until it is closed.

    Args:
        name: name of the thread.
        duties: performed in this order whenever they are due.
        close_seconds: how long `close` waits for the round in progress.
    """

    def __init__(
        self, name: str, duties: Sequence[Duty], *, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        super().__init__(name)
        self.on_gone: OnGone = lambda reason: None
        self._duties = tuple(duties)
        self._close_seconds = close_seconds
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        self.turn()
        self._thread.start()

    def close(self) -> None:
        """End after the round in progress, and wait for it a bounded time."""
        self.stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(self._close_seconds)

    def wake(self) -> None:
        """Look at once for duties that are due."""
        self._wake.set()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        reason = "it returned"
        try:
            self._loop()
        except BaseException as exc:
            # Duties handle every Exception: this is SystemExit, KeyboardInterrupt or a fault of the
            # loop itself.
            reason = f"{type(exc).__name__}: {exc}"
        finally:
            if not self.stopping.is_set():
                _log.critical("thread_ended", thread=self.name, reason=reason)
                self.on_gone(f"thread {self.name} ended: {reason}")

    def _loop(self) -> None:
        while not self.stopping.is_set():
            for duty in self._duties:
                if self.stopping.is_set():
                    return
                if duty.is_due():
                    self.turn()
                    duty.perform()
            self.turn()
            pause = min(duty.due_at for duty in self._duties) - time.monotonic()
            if pause > 0:
                self._wake.wait(min(pause, STEP_SECONDS))
                self._wake.clear()


class BackgroundThreads:
    """All background threads of one process."""

    def __init__(self, on_gone: OnGone) -> None:
        self._on_gone = on_gone
        self._threads: list[BackgroundThread] = []
        self._pulses: list[Pulse] = []
        self._started = False

    def add(self, *threads: BackgroundThread) -> None:
        for thread in threads:
            thread.on_gone = self._on_gone
            self._threads.append(thread)

    def watch(self, pulse: Pulse) -> None:
        """Count a loop that is started and closed elsewhere for liveness."""
        self._pulses.append(pulse)

    def start(self) -> None:
        for pulse in self._pulses:
            pulse.turn()
        for thread in self._threads:
            thread.start()
        self._started = True

    def close(self) -> None:
        """Close the threads, the last added first."""
        for thread in reversed(self._threads):
            thread.stopping.set()
        for thread in reversed(self._threads):
            thread.close()

    def silent(self, stale_seconds: float) -> list[str]:
        """Return the names of the threads that ended, or have not turned for `stale_seconds`; none
        before `start`.
        """
        if not self._started:
            return []
        return [
            thread.name
            for thread in (*self._threads, *self._pulses)
            if not thread.stopping.is_set()
            and (not thread.is_alive() or thread.silent_seconds() > stale_seconds)
        ]


def watch_task(task: asyncio.Task[None], on_gone: OnGone) -> None:
    """Call `on_gone` when a task that should run for the life of the process ends without being
    cancelled.
    """

    def ended(done: asyncio.Task[None]) -> None:
        if done.cancelled():
            return
        exc = done.exception()
        reason = "it returned" if exc is None else f"{type(exc).__name__}: {exc}"
        _log.critical("task_ended", task=done.get_name(), reason=reason)
        on_gone(f"task {done.get_name()} ended: {reason}")

    task.add_done_callback(ended)
