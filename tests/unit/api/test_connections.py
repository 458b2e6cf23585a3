"""Slow and idle connections, against a real server and with real sockets: what is closed, what
stays, and who gets in.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl

from api.connections import protocol_class
from shared.settings import Settings, load_settings

GET = b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
SHORT = {
    "header_timeout_seconds": 0.3,
    "body_timeout_seconds": 0.3,
    "keep_alive_seconds": 0.3,
    "write_timeout_seconds": 0.3,
}


async def app(scope: Any, receive: Any, send: Any) -> None:
    """`/quick` answers, `/body` reads first, `/slow` answers after a second, `/stream` sends an
    event each 0.2 s, `/large` more than a socket holds.
    """
    headers = [(b"content-type", b"text/plain")]
    if scope["path"] == "/body":
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/stream":
        for _ in range(5):
            await send({"type": "http.response.body", "body": b"event\n", "more_body": True})
            await asyncio.sleep(0.2)
    if scope["path"] == "/large":
        for _ in range(400):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})


@asynccontextmanager
async def serving(settings: Settings, **options: Any) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=protocol_class(settings),
        timeout_keep_alive=settings.keep_alive_seconds,
        lifespan="off",
        log_config=None,
        **options,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = server.force_exit = True
        await task


def settings(**values: Any) -> Settings:
    return load_settings({}, **values)


async def opened(
    port: int, *sent: bytes, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    for data in sent:
        writer.write(data)
    return reader, writer


async def until(check: Callable[[], Any]) -> None:
    for _ in range(2000):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never was")


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte at a time for as long as the other side takes it."""
    with suppress(ConnectionError):
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (b"", b"", b""),
        (b"GET /quick HTTP/1.1\r\nhost: x\r\n", b"", b""),
        (b"G", b"ET /quick HTTP/1.1\r\n" * 50, b""),
        (POST % 1000, b"", b"408"),
        (POST % 1000 + b"x" * 999, b"", b"408"),
        (POST % 1000, b"x" * 1000, b"408"),
        (GET, b"", b"200"),
        (GET, b"GET /quick HTTP/1.1\r\nx: " + b"y" * 500, b"200"),
    ],
    ids=[
        "nothing",
        "half of the headers",
        "headers by the byte",
        "no body",
        "most of the body",
        "a body by the byte",
        "idle after an answer",
        "headers by the byte after an answer",
    ],
)
async def test_a_connection_that_is_slow_is_closed(
    first: bytes, then: bytes, status: bytes
) -> None:
    async with serving(settings(**SHORT)) as (port, server):
        reader, writer = await opened(port, first)
        sending = asyncio.create_task(dribble(writer, then))
        with suppress(ConnectionError):
            assert status in (await asyncio.wait_for(reader.read(), 20))[:16]
        await until(lambda: not server.server_state.connections)
        sending.cancel()
        writer.close()


async def test_sixty_half_open_connections_are_gone_and_others_are_served_meanwhile() -> None:
    async with serving(settings(**SHORT)) as (port, server):
        slow = [await opened(port, b"POST /body HTTP/1.1\r\nhost: x\r\n") for _ in range(60)]
        reader, _ = await opened(port, GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await until(lambda: not server.server_state.connections)
        for _, writer in slow:
            writer.close()


@pytest.mark.parametrize("path", ["/slow", "/stream"])
async def test_a_request_that_takes_longer_than_every_deadline_is_answered(path: str) -> None:
    async with serving(settings(**SHORT)) as (port, _):
        reader, _ = await opened(port, GET.replace(b"/quick", path.encode()))
        assert b"end" in await asyncio.wait_for(reader.read(), 20)


async def test_a_body_that_keeps_coming_has_time() -> None:
    """Each 4 KiB earn a second: an upload at 40 KiB a second may take as long as it needs."""
    async with serving(settings(**SHORT)) as (port, _):
        reader, writer = await opened(port, POST % (20 * 4096))
        for _ in range(20):
            writer.write(b"x" * 4096)
            await asyncio.sleep(0.1)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_connection_is_used_again_within_its_idle_time() -> None:
    async with serving(
        settings(**SHORT | {"keep_alive_seconds": 30, "header_timeout_seconds": 0.2})
    ) as (port, _):
        reader, writer = await opened(port)
        for _ in range(3):
            writer.write(GET)
            assert b"end" in await reader.readuntil(b"0\r\n\r\n")
            await asyncio.sleep(0.3)  # longer than headers may take
        writer.write(GET + GET)  # pipelined
        assert b"end" in await reader.readuntil(b"0\r\n\r\n")
        assert b"end" in await reader.readuntil(b"0\r\n\r\n")


async def test_a_client_that_does_not_read_is_closed() -> None:
    async with serving(settings(**SHORT)) as (port, server):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(GET.replace(b"/quick", b"/large"))
        await until(lambda: server.server_state.connections)
        await until(lambda: not server.server_state.connections)
        client.close()


async def test_a_client_that_reads_slowly_is_not_closed() -> None:
    class Slow:
        size, aborted = 100_000, False

        def get_write_buffer_size(self) -> int:
            return self.size

        def is_closing(self) -> bool:
            return self.aborted

        def abort(self) -> None:
            self.aborted = True

    transport, made = Slow(), settings(**{**SHORT, "write_timeout_seconds": 0.05})
    protocol: Any = object.__new__(protocol_class(made))
    protocol.transport, protocol.loop, protocol.client = transport, asyncio.get_running_loop(), None
    protocol.flow, protocol._unread = FlowControl(cast(Any, transport)), None
    protocol.pause_writing()
    for _ in range(40):
        transport.size -= 1
        await asyncio.sleep(0.01)
    assert not transport.aborted
    await until(lambda: transport.aborted)


async def test_a_full_server_closes_who_has_no_request() -> None:
    async with serving(settings(max_connections=3, max_followers=1)) as (port, server):
        waiting = [await opened(port) for _ in range(3)]
        await until(lambda: len(server.server_state.connections) == 3)
        reader, _ = await opened(port, GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):
            assert await asyncio.wait_for(waiting[0][0].read(), 20) == b""  # the oldest
        assert len(server.server_state.connections) == 3


async def test_a_full_server_refuses_when_each_has_a_request() -> None:
    async with serving(settings(max_connections=2, max_followers=1)) as (port, server):
        busy = [await opened(port, GET.replace(b"/quick", b"/slow")) for _ in range(2)]
        await until(lambda: len(server.server_state.tasks) == 2)
        reader, _ = await opened(port, GET)
        with suppress(ConnectionError):
            assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        for reader, _ in busy:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"end")
        reader, _ = await opened(port, GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_deadlines_hold_over_tls(tmp_path: Path) -> None:
    made = tmp_path / "c.pem", tmp_path / "c.key"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-days",
            "1",
            "-nodes",
            "-newkey",
            "rsa:2048",
            "-out",
            made[0],
            "-keyout",
            made[1],
            "-subj",
            "/CN=x",
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(cafile=str(made[0]))
    context.check_hostname = False
    files = {"ssl_certfile": str(made[0]), "ssl_keyfile": str(made[1])}
    async with serving(settings(**SHORT), **files) as (port, server):
        reader, _ = await opened(port, GET.replace(b"/quick", b"/stream"), ssl=context)
        assert b"end" in await reader.readuntil(b"end")
        await opened(port, b"GET /quick HTTP/1.1\r\n", ssl=context)
        await until(lambda: not server.server_state.connections)
