"""kombu's Redis transport, hardened: every error reply of Redis is an outage, and no message ends
the consumer.

    outages     READONLY, UNBLOCKED, MISCONF, OOM, LOADING, NOREPLICAS, NOAUTH and the like are
                errors of the connection: the consumer connects again (`worker.consumer`). kombu
                takes most of them for errors of the program.
    messages    what is no Celery message of ours is dropped with a log line and a metric; a job's
                row is pushed again
    no copies   messages are not kept in `unacked` until they are acknowledged: the row is the job,
                and a worker needs no command but BRPOP to take one, which a full Redis allows

`install` replaces kombu's transport in this process; `worker.app.celery_app` calls it.
"""

from __future__ import annotations

import json
from queue import Empty
from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis
from kombu.transport.virtual.base import Base64
from kombu.utils.encoding import bytes_to_str
from prometheus_client import Counter
from redis.exceptions import RedisError

_ERRORS = (RedisError, OSError)
_HEADERS = ("id", "task")

_log = structlog.get_logger(__name__)


class NotOurs(Exception):
    """A message that is no Celery message of ours; its text says why."""


def parse_message(raw: bytes | str) -> dict[str, Any]:
    """Return a message as kombu takes it. Raises NotOurs."""
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise NotOurs("not JSON") from exc
    if not isinstance(message, dict):
        raise NotOurs("not an object")
    headers, properties = message.get("headers"), message.get("properties")
    if not isinstance(headers, dict) or not all(
        isinstance(headers.get(name), str) for name in _HEADERS
    ):
        raise NotOurs("headers without id and task")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_info"), dict):
        raise NotOurs("properties without delivery_info")
    if (
        not isinstance(properties.get("delivery_tag"), str)
        or properties.get("body_encoding") != "base64"
    ):
        raise NotOurs("properties without delivery_tag or body_encoding")
    if headers.get("eta") is not None or headers.get("expires") is not None:
        raise NotOurs("an eta or an expiry, which the row has")
    try:
        body = json.loads(Base64().decode(message["body"]))
        (content,), options, _ = body
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as exc:
        raise NotOurs("body of another kind") from exc
    if not isinstance(content, dict) or options:
        raise NotOurs("arguments of another kind")
    return message


class Channel(redis.Channel):
    """kombu's channel; `dropped` counts messages that could not be read."""

    ack_emulation = False
    do_restore = False  # what is not acknowledged at the end is not pushed back: its row is
    dropped: Counter | None = None

    def _brpop_read(self, **options: Any) -> bool:
        try:
            try:
                found = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except _ERRORS:
                self.client.connection.disconnect()
                raise
            if not found:
                raise Empty
            queue, raw = bytes_to_str(found[0]).rsplit(self.sep, 1)[0], found[1]
            self._queue_cycle.rotate(queue)  # type: ignore[attr-defined]  # the stubs are of an older kombu
            try:
                self.connection._deliver(parse_message(raw), queue)
            except _ERRORS:
                raise
            except Exception as exc:
                self._drop(queue, raw, exc)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[attr-defined]

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        try:
            return bool(super()._deliver_fanout_message(message, exchange))  # type: ignore[misc]
        except _ERRORS:
            raise
        except Exception as exc:
            self._drop(exchange, b"", exc)
            return True

    def _drop(self, queue: str, raw: bytes, exc: Exception) -> None:
        if self.dropped is not None:
            self.dropped.inc()
        reason = (
            str(exc) if isinstance(exc, NotOurs) else type(exc).__name__
        )  # its text may quote the message
        _log.error("message_dropped", queue=queue, reason=reason, bytes=len(raw))


class Transport(redis.Transport):
    """kombu's transport with our channel."""

    Channel = Channel
    connection_errors = (*redis.Transport.connection_errors, RedisError)


def install(dropped: Counter) -> None:
    """Make every connection of Celery in this process use this transport.

    Args:
        dropped: counts messages that could not be read.
    """
    Channel.dropped = dropped
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"


__all__ = ["Channel", "NotOurs", "Transport", "install", "parse_message"]
