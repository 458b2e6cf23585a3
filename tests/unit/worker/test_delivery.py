"""The sender of webhooks: one connection an attempt, whoever else lives at the same address."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from shared.settings import load_settings
from shared.webhooks import targets
from worker.delivery import Sender


@pytest.fixture
def receiver() -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """A server that would keep connections open; its port, and (Host header, client's port) of each
    request.
    """
    seen: list[tuple[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.headers["host"], self.client_address[1]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1], seen
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def dripping() -> Iterator[int]:
    """A server whose status comes byte by byte, and is good in the end; its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            with suppress(OSError), listening.accept()[0] as connection:
                connection.recv(65_536)
                for byte in b"HTTP/1.1 204 No Content\r\n\r\n":
                    connection.send(bytes([byte]))
                    if over.wait(0.2):
                        return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    over.set()
    listening.close()
    thread.join(10)


def test_an_answer_byte_by_byte_ends_with_the_time_of_all(dripping: int) -> None:
    """No byte is late, the whole is: it would hold the thread, and others, beyond the delivery's
    lease.
    """
    settings = load_settings({}, webhook_allow_private=True, webhook_timeout_seconds=1.0)
    sender = Sender(None, settings)  # type: ignore[arg-type]
    try:
        target = targets.parse_target(f"http://127.0.0.1:{dripping}/hook", allow_private=True)
        with pytest.raises(httpx.TimeoutException):
            sender._send(target, ["127.0.0.1"], b"{}", {})
    finally:
        sender.close()


def test_two_names_at_one_address_share_no_connection(
    receiver: tuple[int, list[tuple[str, int]]],
) -> None:
    """A kept connection belongs to the address: over TLS its certificate would have been checked
    for the other name.
    """
    port, seen = receiver
    settings = load_settings({}, webhook_allow_private=True)
    sender = Sender(None, settings)  # type: ignore[arg-type]  # no database is asked
    try:
        for host in ("a.example", "b.example", "a.example"):
            target = targets.parse_target(f"http://{host}:{port}/hook", allow_private=True)
            assert sender._send(target, ["127.0.0.1"], b"{}", {}).status_code == 204
    finally:
        sender.close()
    assert [host for host, _ in seen] == [
        f"a.example:{port}",
        f"b.example:{port}",
        f"a.example:{port}",
    ]
    assert len({client for _, client in seen}) == 3
