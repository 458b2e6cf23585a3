"""Celery's consumer, kept alive: whatever ends it, it starts again in this process and the model
stays loaded.

Every exception is an outage here. The consumer closes its connection, waits until Redis takes a
write again (with back-off, at most `RETRY_SECONDS_MAX` between two tries) and connects. Running
jobs go on meanwhile; Celery still counts them, so a slot is never given twice. `probe` is the
smallest command with the rights and the refusals of BRPOP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis
import structlog
from celery.worker import WorkController
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from prometheus_client import Counter
from redis.exceptions import RedisError

from shared.background import Duty, OnGone, Pulse
from shared.queue import client as queue_client

RETRY_SECONDS_MAX = 2.0
PROBE_TIMEOUT_SECONDS = 2.0
PROBE_KEY = "vdiff.probe"  # a list that never is
TURN_SECONDS = 5.0
_SLICE_SECONDS = 0.1  # of a wait, between two looks for a shutdown

_log = structlog.get_logger(__name__)


def probe(client: redis.Redis) -> None:
    """Try what BRPOP needs: a master that takes writes. It changes nothing. Raises
    redis.RedisError.
    """
    client.rpop(PROBE_KEY)


class _Consumer(Consumer):
    """Celery's consumer with our way to connect. `consumer_class` fills in what it needs."""

    hub: Any
    redis_url: str
    pulse: Pulse
    duty: Duty
    restarts: Counter

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connection_errors = (
            Exception,
        )  # of these Celery starts it again; a shutdown is a SystemExit
        self._pause_seconds = 0.0

    def connect(self) -> Any:
        self._wait_for_redis()
        connection = super().connect()
        # Celery cancels this with the other timers of a connection.
        self.hub.timer.call_repeatedly(TURN_SECONDS, self.pulse.turn)
        return connection

    def on_ready(self) -> None:
        super().on_ready()
        self.duty.succeeded()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._note(exc)
        super().on_connection_error_after_connected(exc)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._note(exc)

    def _note(self, exc: Exception) -> None:
        self.restarts.inc()
        self._pause_seconds = self.duty.failed(exc)

    def _wait_for_redis(self) -> None:
        """Return when Redis takes writes. Raises WorkerShutdown."""
        self._sleep(self._pause_seconds)
        self._pause_seconds = 0.0
        client = queue_client.connect(self.redis_url, timeout_seconds=PROBE_TIMEOUT_SECONDS)
        try:
            while True:
                try:
                    probe(client)
                except (RedisError, OSError) as exc:
                    self._sleep(self.duty.failed(exc))
                else:
                    return
        finally:
            with suppress(RedisError, OSError):
                client.close()

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            maybe_shutdown()
            self.pulse.turn()
            time.sleep(min(left, _SLICE_SECONDS))
        maybe_shutdown()


class _Controller(WorkController):
    """Celery's controller; says at once that it gave up, instead of when the last job has ended."""

    on_gone: OnGone

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        if exitcode:
            self.on_gone(f"Celery's consumer ended with {exitcode}")
        super().stop(in_sighandler=in_sighandler, exitcode=exitcode)


def make_controller(
    app: Any,
    *,
    name: str,
    redis_url: str,
    slots: int,
    pulse: Pulse,
    failures: Counter,
    restarts: Counter,
    on_gone: OnGone,
) -> WorkController:
    """Return a consumer of the app's queues with a pool of `slots` threads; `start` returns at the
    end.

    Args:
        pulse: turned by the consumer's loop, also while it waits for Redis.
        on_gone: called if Celery gives up by itself.
    """
    run: Callable[[], None] = lambda: None  # noqa: E731
    duty = Duty("consume", run, every=0.0, failures=failures, backoff_max=RETRY_SECONDS_MAX)
    parts = {"redis_url": redis_url, "pulse": pulse, "duty": duty, "restarts": restarts}
    controller = type("Controller", (_Controller,), {"on_gone": staticmethod(on_gone)})
    # WorkController, not celery.apps.worker.Worker: the program would install signal handlers of
    # its own.
    made: WorkController = controller(
        app=app,
        hostname=name,
        pool_cls="threads",
        concurrency=slots,
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        task_events=True,  # for Flower
        consumer_cls=type("Consumer", (_Consumer,), parts),
    )
    return made
