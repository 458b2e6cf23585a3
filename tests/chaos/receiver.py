"""The receiver of webhooks. It notes every request with its headers and bytes, and misbehaves on
demand.
"""

from __future__ import annotations

import asyncio
import random
import time

from tests.chaos.records import History, Received

MODES = (
    "good",
    "fails",
    "hangs",
    "redirects",
    "slow",
    "refuses",
    "nonsense",
    "hangs up",
    "endless",
)
HANG_SECONDS = 6.0  # longer than VDIFF_WEBHOOK_TIMEOUT_SECONDS
SLOW_SECONDS = (0.3, 1.5)
SINGLE_FAILURES = 0.03  # also in good times
# Every status that is no success, but for 410, which disables the endpoint, and 1xx, which is no
# answer.
REFUSALS = (
    300,
    301,
    303,
    304,
    307,
    308,
    400,
    401,
    403,
    404,
    405,
    408,
    409,
    413,
    415,
    422,
    425,
    429,
    451,
    500,
    501,
    502,
    503,
    504,
    507,
    599,
)
DRIP_SECONDS = 0.1


class Receiver:
    """Answers at /own/TENANT and /endpoint/TENANT; what arrives at /redirected followed a redirect,
    which nothing may.
    """

    def __init__(self, history: History, seed: int) -> None:
        self._history = history
        self._random = random.Random(f"receiver {seed}")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.mode = "good"  # may be set from any thread
        self.failures = SINGLE_FAILURES
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the sender died, or gave up
        finally:
            writer.transport.abort() if writer.is_closing() else writer.close()
            self._tasks.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = head[0].split(" ")[1].strip("/")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        at, mode = time.time(), self.mode
        code = 200
        if mode == "fails" or self._random.random() < self.failures:
            code = self._random.choice((500, 503))
        elif mode == "redirects":
            code = 302
        elif mode == "refuses":
            code = self._random.choice(REFUSALS)
        elif mode == "slow":
            await asyncio.sleep(self._random.uniform(*SLOW_SECONDS))
        if mode in ("hangs", "nonsense", "hangs up"):
            self._history.received.append(Received(at, path, headers, body, None))
            if mode == "hangs":
                await asyncio.sleep(HANG_SECONDS)
            elif mode == "nonsense":
                writer.write(b"\x00\x16\x03 220 ready\r\n\r\n")
                await writer.drain()
            return
        # Noted before the answer goes out: a sender that is told 200 must find it here.
        self._history.received.append(Received(at, path, headers, body, code))
        location = f"Location: {self.url}/redirected\r\n" if 300 <= code < 400 else ""
        endless = mode == "endless" and code == 200
        length = "" if endless else "Content-Length: 0\r\n"
        writer.write(
            f"HTTP/1.1 {code} Chaos\r\n{location}{length}Connection: close\r\n\r\n".encode()
        )
        await writer.drain()
        if endless:
            await self._drip(writer)

    @staticmethod
    async def _drip(writer: asyncio.StreamWriter) -> None:
        """Send a body that goes on for longer than a sender may wait."""
        for _ in range(round(HANG_SECONDS / DRIP_SECONDS)):
            writer.write(b"." * 1024)
            await writer.drain()
            await asyncio.sleep(DRIP_SECONDS)
