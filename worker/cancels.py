"""The fast path of a cancel: a thread that hears `vdiff:cancel` and aborts the attempt within one step.

It also hears `vdiff:dispatch` for the dispatcher, as one subscription is enough for a process.

Redis may lose the message; the heartbeat brings the same news from PostgreSQL. The thread survives any outage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis
import structlog
from redis.exceptions import RedisError

from shared.events import CANCEL_CHANNEL
from shared.queue.window import DISPATCH_CHANNEL
from worker.held import HeldAttempts, StopReason

_POLL_SECONDS = 1.0  # how long closing may take; also far below redis-py's 5 s read timeout
_RECONNECT_SECONDS = 0.5

_log = structlog.get_logger(__name__)


class CancelListener:
    def __init__(self, client: redis.Redis, held: HeldAttempts, on_waiting: Callable[[str], None]) -> None:
        self._redis = client
        self._held = held
        self._on_waiting = on_waiting  # called with a model that has jobs without a message
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vdiff-cancels", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * _POLL_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
                with subscription:
                    subscription.subscribe(CANCEL_CHANNEL, DISPATCH_CHANNEL)
                    while not self._stop.is_set():
                        message = subscription.get_message(timeout=_POLL_SECONDS)
                        if message is not None:
                            self._hear(_text(message["channel"]), _text(message["data"]))
            except (RedisError, OSError) as exc:
                _log.warning("cancel_subscription_lost", error=str(exc))
                self._stop.wait(_RECONNECT_SECONDS)

    def _hear(self, channel: str, data: str) -> None:
        if channel == DISPATCH_CHANNEL:
            self._on_waiting(data)
            return
        held = self._held.get(data)
        # Aborting is safe even if the message were forged or late: the row then says `cancelled`, fenced as ever.
        if held is not None:
            held.stop(StopReason.CANCELLED)


def _text(data: bytes | str) -> str:
    return data.decode() if isinstance(data, bytes) else data
