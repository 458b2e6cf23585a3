"""Connections with deadlines: uvicorn's protocol closes an idle connection, and no other slow one.

    a connection that sends nothing, or its headers slowly   header_timeout_seconds
    a body that comes slowly                                 body_timeout_seconds, and a second for
                                                             each 4 KiB of it
    a client that reads none of its answer                   write_timeout_seconds
    between two requests                                     keep_alive_seconds (uvicorn's own)
    more than max_connections                                the one that has waited longest without
                                                             a request is closed; when each has one,
                                                             the new connection gets a 503

All of it happens before a key is looked at. A stream, or a request that waits for its job, has no
deadline here: its headers and body have come, and what it was sent was read.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any, ClassVar

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared.settings import Settings

BODY_BYTES_PER_SECOND = 4096
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: 25\r\n\r\n"
    b"the request came too late"
)
_log = structlog.get_logger(__name__)


class DeadlineProtocol(HttpToolsProtocol):
    """One connection. `protocol_class` makes the class for a process's settings."""

    settings: ClassVar[Settings]
    waiting: ClassVar[
        dict[DeadlineProtocol, None]
    ]  # connections without a request, the oldest first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: TimerHandle | None = None  # of headers or body
        self._unread: TimerHandle | None = None  # of an answer
        self._received = 0  # bytes of the body

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.settings.max_connections and not self._make_room():
            _log.warning("too_many_connections", open=len(self.connections))
            transport.write(_FULL)
            transport.close()
            # uvicorn's other callbacks look at these.
            self.transport = transport
            return
        super().connection_made(transport)
        self.waiting[self] = None
        self._start(self.settings.header_timeout_seconds)

    def _make_room(self) -> bool:
        """Close the connection that has waited longest without a request; False when there is none."""
        oldest = next(iter(self.waiting), None)
        if oldest is None:
            return False
        self.waiting.pop(oldest)
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self._stop()
        self._stop_unread()
        if self.flow is None:  # it was refused
            self.parser = None
            return
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.flow is None or self.transport.is_closing():
            return
        if self._deadline is None and self in self.waiting:
            self._start(self.settings.header_timeout_seconds)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.waiting.pop(self, None)
        self._received = 0
        self._start(self.settings.body_timeout_seconds)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._received += len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            self.waiting[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_unread()
        self._await_reading()

    def _await_reading(self) -> None:
        self._unread = self.loop.call_later(
            self.settings.write_timeout_seconds,
            self._check_reading,
            self.transport.get_write_buffer_size(),
        )

    def _check_reading(self, before: int) -> None:
        """Close the connection, unless the client read a part of its answer since the buffer had
        `before` bytes.
        """
        self._unread = None
        if self.transport.get_write_buffer_size() < before:
            self._await_reading()
        else:
            self._abort("answer_not_read")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _start(self, seconds: float) -> None:
        self._stop()
        now = self.loop.time()
        self._deadline = self.loop.call_later(seconds, self._check, now, seconds)

    def _check(self, began: float, seconds: float) -> None:
        """Close the connection, unless the body that came meanwhile earned it more time."""
        now = self.loop.time()
        if self.flow.read_paused:  # it is the application that does not read
            began = now
        left = began + seconds + self._received / BODY_BYTES_PER_SECOND - now
        if left > 0:
            self._deadline = self.loop.call_later(left, self._check, began, seconds)
            return
        self._deadline = None
        if self not in self.waiting and not self.cycle.response_started:
            self.transport.write(_LATE)
        self._abort("request_too_slow", gently=True)

    def _abort(self, event: str, *, gently: bool = False) -> None:
        if self.transport.is_closing():
            return
        _log.info(event, client=self.client[0] if self.client else None)
        close: Callable[[], None] = self.transport.close if gently else self.transport.abort
        close()

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def protocol_class(settings: Settings) -> type[DeadlineProtocol]:
    """Return the protocol for a server with these settings."""
    return type("Connection", (DeadlineProtocol,), {"settings": settings, "waiting": {}})
