"""The fast path of a cancel: a thread that hears `vdiff:cancel` and aborts the attempt within one
step.

A message is a hint to look at the row: the thread reads `cancel_requested` and stops only what the
row says is to stop. A message that anybody else published, or that is late, stops nothing.

The thread also hears `vdiff:dispatch` for the dispatcher, as one subscription is enough for a
process.

Redis may lose the message; the heartbeat brings the same news from PostgreSQL. The thread survives
any outage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import redis
import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared.background import BackgroundThread, Duty
from shared.db.session import Database
from shared.events import CANCEL_CHANNEL
from shared.jobs import repository
from shared.metrics import WORKER_DUTY_FAILURES
from shared.queue.window import DISPATCH_CHANNEL
from worker.held import HeldAttempts, StopReason

_POLL_SECONDS = 1.0  # how long closing may take; also far below redis-py's 5 s read timeout
_RECONNECT_SECONDS = 0.5
_MESSAGES_MAX = 1_000  # read before the rows are looked at, so that many messages are one query
_MODEL_MAX_BYTES = 1_024

_log = structlog.get_logger(__name__)


class CancelListener:
    def __init__(
        self,
        client: redis.Redis,
        database: Database,
        held: HeldAttempts,
        on_waiting: Callable[[str], None],
    ) -> None:
        self._redis = client
        self._database = database
        self._held = held
        self._on_waiting = on_waiting  # called with a model that has jobs without a message
        duty = Duty(
            "hear_cancels",
            self._listen,
            every=0.0,
            failures=WORKER_DUTY_FAILURES,
            backoff_max=_RECONNECT_SECONDS,
        )
        self.thread = BackgroundThread("vdiff-cancels", [duty], close_seconds=2 * _POLL_SECONDS)

    def _listen(self) -> None:
        """Hear the channels until the thread is closed. Raises redis.RedisError: the subscription
        is lost.
        """
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        with subscription:
            subscription.subscribe(CANCEL_CHANNEL, DISPATCH_CHANNEL)
            while not self.thread.stopping.is_set():
                self.thread.turn()
                self._hear(subscription)

    def _hear(self, subscription: redis.client.PubSub) -> None:
        """Wait for a message, take those that are there already, then act on all of them."""
        asked: set[str] = set()
        message = subscription.get_message(timeout=_POLL_SECONDS)
        for _ in range(_MESSAGES_MAX):
            if message is None:
                break
            text = _text(message["data"])
            if _text(message["channel"]) == DISPATCH_CHANNEL:
                self._on_waiting(text)
            else:
                asked.add(text)
            message = subscription.get_message(timeout=0)
        if asked:
            self.look(asked)

    def look(self, job_ids: Iterable[str]) -> None:
        """Stop the running attempts among these jobs whose rows ask for it."""
        held = {one.pair: one for job_id in job_ids if (one := self._held.get(job_id)) is not None}
        if not held:
            return
        try:
            with self._database.read() as session:
                rows = session.execute(repository.cancels_of(held)).all()
        except SQLAlchemyError as exc:
            _log.warning("cancel_not_checked", error=type(exc).__name__)  # the heartbeat brings it
            return
        for row in rows:
            held[row.id, row.attempt].stop(StopReason.CANCELLED)


def _text(data: bytes | str) -> str:
    """The message as text; bytes that are no text match no job and no model."""
    return data[:_MODEL_MAX_BYTES].decode(errors="replace") if isinstance(data, bytes) else data
