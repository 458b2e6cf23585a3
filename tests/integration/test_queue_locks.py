"""Requests that wait for the lock of a key's queue, or of a tenant's files, keep no other tenant
from a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
import redis.asyncio
from sqlalchemy import select, text

from shared.db import serial
from shared.db.serial import LockTimeout, SerialWrites
from shared.db.session import AsyncDatabase, Database
from shared.files.service import FileService
from shared.ids import new_id
from shared.jobs import lanes
from shared.jobs.service import JobService, Prepared
from shared.keys.principal import Limits
from shared.served_models import ServedModels
from shared.settings import load_settings
from shared.watch import JobWatch
from tests.integration.conftest import ApiProcess, Jobs, new_key

pytestmark = pytest.mark.integration

POOL = 3
LIMITS = Limits(queued_jobs=50)


@contextmanager
def held(database: Database, name: str) -> Iterator[None]:
    """Hold an advisory lock as another process would."""
    with database.write() as session:
        session.execute(select(*serial.lock(name)))
        yield


@asynccontextmanager
async def small_pool(jobs: Jobs) -> AsyncIterator[AsyncDatabase]:
    database = AsyncDatabase(jobs.database_url, pool_size=POOL, max_overflow=0, pool_wait_s=1.0)
    try:
        yield database
    finally:
        await database.dispose()


@asynccontextmanager
async def service_of(jobs: Jobs, database: AsyncDatabase) -> AsyncIterator[JobService]:
    async def nothing_over(job_ids: object) -> list[str]:
        return []

    client = redis.asyncio.Redis.from_url(jobs.redis_url)
    try:
        yield JobService(
            database,
            client,
            ServedModels(database),
            JobWatch(client, nothing_over),
            load_settings({}),
        )
    finally:
        await client.aclose()


def job_of(jobs: Jobs, key_id: str) -> Prepared:
    values = {
        "id": new_id("job"),
        "tenant": "t",
        "key_id": key_id,
        "endpoint": "/v1/completions",
        "model": jobs.model,
        "body": {},
        "priority": "normal",
        "params": {},
        "prompt_token_ids": [1],
        "tokens": 1,
        "idempotency_key": None,
    }
    return Prepared(values["id"], None, values, automatic_retry=False, limits=LIMITS)  # type: ignore[arg-type]


async def all_wait(writes: SerialWrites, name: object, count: int) -> None:
    async with asyncio.timeout(60):
        while writes.users(name) < count:
            await asyncio.sleep(0.01)


async def test_submissions_of_one_key_leave_connections_for_others(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "LOCK_TIMEOUT_MS", 60_000)
    monkeypatch.setattr(serial, "TURN_SECONDS", 60.0)
    async with small_pool(jobs) as database, service_of(jobs, database) as service:
        with held(jobs.database, "queue t a"):
            mine = [
                asyncio.create_task(service.enqueue(job_of(jobs, "a"))) for _ in range(POOL + 2)
            ]
            await all_wait(service.queue_writes, ("t", "a"), POOL + 2)
            for _ in range(3):
                assert (await service.enqueue(job_of(jobs, "b"))).created
            assert not any(task.done() for task in mine)
        assert all([accepted.created for accepted in await asyncio.gather(*mine)])
        assert service.queue_writes.names == 0  # forgotten when idle
    with jobs.database.read() as session:
        assert session.execute(lanes.queued_of("t", "a")).one()[0] == POOL + 2


async def test_a_submission_does_not_wait_for_a_lock_without_end(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one with the connection ends by `lock_timeout`, those behind it by the time of their
    turn; then all is well.
    """
    monkeypatch.setattr(serial, "LOCK_TIMEOUT_MS", 300)
    monkeypatch.setattr(serial, "TURN_SECONDS", 0.1)
    async with small_pool(jobs) as database, service_of(jobs, database) as service:
        with held(jobs.database, "queue t a"):
            made = [service.enqueue(job_of(jobs, "a")) for _ in range(POOL + 2)]
            ends = await asyncio.gather(*made, return_exceptions=True)
        assert all(isinstance(end, LockTimeout) and end.retryable for end in ends), ends
        assert service.queue_writes.names == 0
        monkeypatch.setattr(serial, "TURN_SECONDS", 60.0)
        assert (await service.enqueue(job_of(jobs, "a"))).created
    with jobs.database.read() as session:
        assert session.execute(lanes.queued_of("t", "a")).one()[0] == 1


async def test_a_cancelled_request_hands_its_turn_on(jobs: Jobs) -> None:
    async with small_pool(jobs) as database:
        writes = SerialWrites(database, "it")
        order: list[int] = []

        async def write(number: int) -> None:
            async with writes.write("a"):
                order.append(number)
                await asyncio.sleep(60 if number == 0 else 0)

        tasks = [asyncio.create_task(write(number)) for number in range(4)]
        await all_wait(writes, "a", 4)
        async with asyncio.timeout(60):
            while not order:
                await asyncio.sleep(0.01)
        tasks[1].cancel()  # while it waits
        tasks[0].cancel()  # while it runs
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 2, 3] and writes.names == 0


async def test_uploads_of_one_tenant_leave_connections_for_others(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "LOCK_TIMEOUT_MS", 60_000)
    monkeypatch.setattr(serial, "TURN_SECONDS", 60.0)

    async def upload(files: FileService, tenant: str) -> str:
        async with files.upload(tenant, purpose="batch") as made:
            await made.write(b"x")
            made.filename = "f"
        return str((await files.publish(made)).id)

    async with small_pool(jobs) as database:
        files = FileService(database, None, max_bytes=10, quota_bytes=100)
        with held(jobs.database, "files a"):
            mine = [asyncio.create_task(upload(files, "a")) for _ in range(POOL + 2)]
            await all_wait(files._storing, "a", POOL + 2)
            assert await upload(files, "b")
            assert not any(task.done() for task in mine)
        assert len(set(await asyncio.gather(*mine))) == POOL + 2
        monkeypatch.setattr(serial, "LOCK_TIMEOUT_MS", 100)
        with held(jobs.database, "files a"), pytest.raises(LockTimeout):
            await upload(files, "a")
    left = jobs.execute(text("SELECT count(*) AS n FROM files WHERE tenant = 'a'"))
    assert left[0].n == POOL + 2  # the upload that was refused is gone


def test_every_face_answers_503_when_the_queue_stays_locked(workerless: ApiProcess) -> None:
    jobs = workerless.jobs
    key = new_key(jobs, tenant="t-locked")
    other = new_key(jobs, tenant="t-other")
    key_id = jobs.execute(text("SELECT id FROM api_keys WHERE tenant = 't-locked'"))[0].id
    chat = {"model": "vdiff-tiny", "messages": [{"role": "user", "content": "Hi"}]}
    requests = {
        "/v1/jobs": {"endpoint": "/v1/chat/completions", "body": chat},
        "/v1/chat/completions": chat,
        "/v1/completions": {"model": "vdiff-tiny", "prompt": "x"},
        "/v1/responses": {"model": "vdiff-tiny", "input": "x"},
    }

    async def post(client: httpx.AsyncClient, path: str, with_key: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {with_key}"}
        return await client.post(path, json=requests[path], headers=headers, timeout=120)

    async def main() -> None:
        async with httpx.AsyncClient(base_url=workerless.url) as client:
            mine = [asyncio.create_task(post(client, path, key)) for path in requests]
            await asyncio.wait(mine, return_when=asyncio.FIRST_COMPLETED)
            assert (await post(client, "/v1/jobs", other)).status_code == 202
            for answer in await asyncio.gather(*mine):
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    503,
                    "lock_timeout",
                ), answer.text
                assert "the queue of this key" in answer.json()["error"]["message"]
                assert int(answer.headers["Retry-After"]) > 0

    with held(jobs.database, f"queue t-locked {key_id}"):
        asyncio.run(main())
