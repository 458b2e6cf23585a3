"""Celery's way to Redis, made to drop what is no message instead of ending the worker.

A queue is a Redis list that others may write into. kombu lets the error of an unreadable entry through, and Celery's
consumer ends with it. Such an entry is dropped here with a log line: the row of a job is the truth, and one that stays
queued is pushed again.
"""

from __future__ import annotations

from queue import Empty
from typing import Any

import structlog
from kombu.transport import redis as kombu_redis

_log = structlog.get_logger(__name__)
_Channel: Any = kombu_redis.Channel
_Message: Any = _Channel.Message


class UnreadableMessage(ValueError):
    """An entry of a queue that is no message."""


class CheckedMessage(_Message):  # type: ignore[misc]  # kombu has no types
    """A message; `UnreadableMessage` for anything that lacks its shape."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise UnreadableMessage(type(exc).__name__) from exc


class CheckedChannel(_Channel):  # type: ignore[misc]
    """A channel that takes an unreadable entry for no entry."""

    Message = CheckedMessage

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except ValueError as exc:  # also bad JSON and bad UTF-8
            _log.error("message_not_readable", error=type(exc).__name__)
            raise Empty from exc


def install() -> None:
    """Have every connection of this process use `CheckedChannel`.

    `broker_transport` would be the setting for it, but kombu ignores that one for `redis+socket://`.
    """
    kombu_redis.Transport.Channel = CheckedChannel
