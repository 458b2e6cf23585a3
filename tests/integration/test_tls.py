"""PostgreSQL and Redis over TLS, as a provider has them: every kind of client we use verifies, and
connects when it may.

A front on loopback speaks TLS and passes on what is inside to the servers of the test run.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import kombu.exceptions
import pytest
import redis
import redis.asyncio
from flower.utils import broker as flower_broker
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from api.limits import RequestLimiter
from shared.db.session import AsyncDatabase, Database
from shared.keys.principal import Limits, Principal
from worker.app import celery_app

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl"),
]
SSL_REQUEST = struct.pack(
    "!ii", 8, 80877103
)  # what a client of PostgreSQL sends before it speaks TLS
DAY = ["-days", "1", "-nodes", "-newkey", "rsa:2048"]


@dataclass(frozen=True)
class Fronts:
    postgres: int
    redis: int
    ca: Path
    another_ca: Path


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    made = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        *DAY,
        "-out",
        made[0],
        "-keyout",
        made[1],
        "-subj",
        f"/CN={name}",
    ]
    subprocess.run(
        [*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    return made


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(OSError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()


async def leave(servers: list[asyncio.Server]) -> None:
    """Nothing of ours stays open."""
    for server in servers:
        server.close()
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.sleep(0)  # in which the transports close


async def front(
    context: ssl.SSLContext, target: tuple[str, int], *, postgres: bool
) -> asyncio.Server:
    """A listener that ends TLS; PostgreSQL's clients ask for it in clear first."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            if postgres:
                assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(context)
            behind = await asyncio.open_connection(*target)
            await asyncio.gather(pass_on(reader, behind[1]), pass_on(behind[0], writer))

    return await asyncio.start_server(handle, "127.0.0.1", 0, ssl=None if postgres else context)


@pytest.fixture(scope="module")
def fronts(
    postgres_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fronts]:
    folder = tmp_path_factory.mktemp("tls")
    (ca, key), (another, _) = certificate(folder, "ours"), certificate(folder, "theirs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, key)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def listen(url: str, postgres: bool) -> asyncio.Server:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        made = front(context, (parts.hostname, parts.port), postgres=postgres)
        return asyncio.run_coroutine_threadsafe(made, loop).result(10)

    servers = [listen(postgres_url, True), listen(redis_url, False)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    yield Fronts(ports[0], ports[1], ca, another)
    asyncio.run_coroutine_threadsafe(leave(servers), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def secured(url: str, port: int, options: str) -> str:
    parts = urlsplit(url)
    scheme = "rediss" if parts.scheme == "redis" else parts.scheme
    name = parts.netloc.rpartition("@")[0]
    return parts._replace(
        scheme=scheme, netloc=f"{name}@127.0.0.1:{port}".lstrip("@"), query=options
    ).geturl()


async def asked_by_the_api(url: str) -> int:
    database = AsyncDatabase(url)
    try:
        async with database.read() as session:
            return int((await session.execute(text("SELECT 1"))).scalar_one())
    finally:
        await database.dispose()


def asked_by_a_worker(url: str) -> int:
    database = Database(url)
    try:
        with database.read() as session:
            return int(session.execute(text("SELECT 1")).scalar_one())
    finally:
        database.dispose()


def test_postgresql(fronts: Fronts, postgres_url: str) -> None:
    good = secured(postgres_url, fronts.postgres, f"sslmode=verify-full&sslrootcert={fronts.ca}")
    assert asyncio.run(asked_by_the_api(good)) == asked_by_a_worker(good) == 1
    bad = secured(
        postgres_url, fronts.postgres, f"sslmode=verify-full&sslrootcert={fronts.another_ca}"
    )
    with pytest.raises((SQLAlchemyError, ssl.SSLError)):
        asyncio.run(asked_by_the_api(bad))
    with pytest.raises(SQLAlchemyError):
        asked_by_a_worker(bad)


def consume(url: str) -> None:
    """Connect as a worker does."""
    with celery_app(url, model="m").connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0.0)


def shown_by_flower(url: str) -> list[dict[str, int]]:
    conf = celery_app(url, model=None).conf
    page = flower_broker.Broker(
        conf.broker_url, broker_options={}, broker_use_ssl=conf.broker_use_ssl
    )
    return list(asyncio.run(page.queues(["tls"])))


async def limited(url: str) -> dict[str, str]:
    client = redis.asyncio.Redis.from_url(url)
    limiter = RequestLimiter(client, url)
    try:
        assert await client.ping()
        return dict(
            await limiter.hit(Principal("tls", frozenset({"jobs"}), Limits(requests_per_minute=5)))
        )
    finally:
        await client.aclose()


def test_redis(fronts: Fronts, redis_url: str) -> None:
    good = secured(redis_url, fronts.redis, f"ssl_ca_certs={fronts.ca}")
    assert redis.Redis.from_url(good).ping()
    consume(good)
    assert [queue["name"] for queue in shown_by_flower(good)] == ["tls"]
    assert asyncio.run(limited(good))
    for options in ("", f"ssl_ca_certs={fronts.another_ca}"):
        bad = secured(redis_url, fronts.redis, options)
        with pytest.raises(redis.ConnectionError):
            redis.Redis.from_url(bad).ping()
        with pytest.raises(kombu.exceptions.OperationalError):
            consume(bad)  # kombu by itself would not look at the certificate
