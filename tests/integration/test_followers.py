"""Clients that wait and follow: idle ones cost next to nothing, none is missed, none holds up
another, and they are bounded.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from shared.events import MOVED_CHANNEL, events_key
from shared.jobs import repository
from tests.integration.conftest import ApiProcess, Jobs, eventually, new_key

pytestmark = pytest.mark.integration

FOLLOWERS = 120
WINDOW_SECONDS = 5.0
TRANSACTIONS_PER_SECOND = 20  # of the whole process, with its caretakers
REDIS_CONNECTIONS = 10


@pytest.fixture
def start_api(jobs: Jobs, tmp_path: Path) -> Iterator[Callable[..., ApiProcess]]:
    """An API without any worker: what its jobs wait for never comes by itself."""
    with ExitStack() as stack:

        def start(**settings: object) -> ApiProcess:
            api = ApiProcess(jobs, tmp_path / f"api-{time.monotonic_ns()}.log", **settings)
            stack.callback(api.end)
            return api.wait_ready(path="/health/live")

        yield start


def transactions(jobs: Jobs) -> int:
    with jobs.database.read() as session:
        session.execute(text("SELECT pg_stat_force_next_flush()"))
        found = session.execute(
            text(
                "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
            )
        )
        return int(found.scalar_one())


def connections(jobs: Jobs) -> int:
    return len(jobs.redis.client_list())


@asynccontextmanager
async def following(api: ApiProcess, paths: list[str]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Requests that are open at once; a stream's task returns its events, another one's its object."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=api.url, timeout=120, limits=limits) as client:
        begun = asyncio.Semaphore(0)

        async def follow(path: str) -> Any:
            if "events" not in path:
                begun.release()
                return (await client.get(path)).json()
            async with client.stream("GET", path) as stream:
                assert stream.status_code == 200, await stream.aread()
                begun.release()
                return [line async for line in stream.aiter_lines()]

        tasks = [asyncio.create_task(follow(path)) for path in paths]
        try:
            async with asyncio.timeout(90):
                for _ in tasks:
                    await begun.acquire()
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def last_event(lines: list[str]) -> tuple[str, Any]:
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return kinds[-1], json.loads(data[-1])


async def test_idle_followers_cost_next_to_nothing_and_hear_of_every_end(
    jobs: Jobs, start_api: Callable[..., ApiProcess]
) -> None:
    before = connections(jobs)
    api = start_api(max_wait_seconds=120)
    ids = [jobs.submit(push=0) for _ in range(FOLLOWERS)]
    paths = [
        f"/v1/jobs/{i}/events" if n % 2 else f"/v1/jobs/{i}?wait=100" for n, i in enumerate(ids)
    ]
    paths += ["/v1/overview/events"] * 10
    async with following(api, paths) as tasks:
        await asyncio.sleep(2)  # the last of the requests have read their rows
        began, moved = time.monotonic(), transactions(jobs)
        await asyncio.sleep(WINDOW_SECONDS)
        rate = (transactions(jobs) - moved) / (time.monotonic() - began)
        assert rate <= TRANSACTIONS_PER_SECOND
        assert connections(jobs) - before <= REDIS_CONNECTIONS
        # No message tells of these ends: PostgreSQL is asked.
        for job_id in ids:
            jobs.execute(repository.request_cancel(job_id))
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*tasks[:FOLLOWERS])
        for n, (job_id, end) in enumerate(zip(ids, ends, strict=True)):
            kind, job = last_event(end) if n % 2 else ("done", end)
            assert (kind, job["id"], job["status"]) == ("done", job_id, "cancelled")
    assert connections(jobs) - before <= REDIS_CONNECTIONS


def put_events(jobs: Jobs, job_id: str, count: int, text_of_one: str) -> None:
    """Put the events of a running job into Redis, as a worker does."""
    pipe = jobs.redis.pipeline(transaction=False)
    for n in range(count):
        data = {
            "attempt": 1,
            "index": 0,
            "step": n + 1,
            "tokens_committed": n + 1,
            "tokens_total": count,
            "offset": n * len(text_of_one),
            "text": text_of_one,
        }
        pipe.xadd(events_key(job_id), {"t": "progress", "d": json.dumps(data)})
    pipe.publish(MOVED_CHANNEL, f"{job_id} job_other")
    pipe.execute()


async def test_a_client_that_reads_nothing_holds_up_nobody(
    jobs: Jobs, start_api: Callable[..., ApiProcess]
) -> None:
    api = start_api()
    job_id = jobs.submit(push=0)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    await writer.drain()
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")  # and nothing more is read
    memory = memory_of(api.process.pid)
    async with following(api, [f"/v1/jobs/{job_id}/events"] * 5) as tasks:
        for _ in range(20):
            put_events(jobs, job_id, 50, "x" * 10_000)
        jobs.execute(repository.request_cancel(job_id))
        async with asyncio.timeout(90):
            for lines in await asyncio.gather(*tasks):
                assert sum(line == "event: progress" for line in lines) == 1_000
                assert last_event(lines)[0] == "done"
    assert memory_of(api.process.pid) - memory < 60 << 20  # each client was told 10 MB
    writer.close()


def memory_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        * 1024
    )


async def test_a_stream_goes_on_exactly_where_it_was(
    jobs: Jobs, start_api: Callable[..., ApiProcess]
) -> None:
    api = start_api()
    job_id = jobs.submit(push=0)
    put_events(jobs, job_id, 100, "ab")
    # Things that no worker wrote stop no stream, and are not shown.
    for junk in (
        {"t": "progress", "d": "{"},
        {"x": "y"},
        {"t": "progress", "d": '{"index": 10000000000}'},
    ):
        jobs.redis.xadd(events_key(job_id), junk)  # type: ignore[arg-type]
    put_events(jobs, job_id, 100, "ab")
    jobs.execute(repository.request_cancel(job_id))

    async def read(last_id: str | None) -> list[tuple[str, str]]:
        headers = {} if last_id is None else {"last-event-id": last_id}
        async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
            answer = await client.get(f"/v1/jobs/{job_id}/events", headers=headers)
        blocks = [
            dict(line.split(": ", 1) for line in b.splitlines())
            for b in answer.text.strip().split("\n\n")
        ]
        return [(block["id"], block["event"]) for block in blocks]

    whole = await read(None)
    assert [kind for _, kind in whole] == ["queued"] + 200 * ["progress"] + ["done"]
    for cut in (1, 32, 33, 100, 101, 199, 200):
        assert await read(whole[cut][0]) == whole[cut + 1 :]
    assert [kind for _, kind in await read(f"{2**64 - 1}-{2**64 - 1}")] == ["done"]


async def test_followers_are_bounded_by_key_and_by_process(
    jobs: Jobs, start_api: Callable[..., ApiProcess]
) -> None:
    api = start_api(max_followers_per_key=3, max_followers=4)
    tenant = "t"
    keys = [new_key(jobs, tenant=tenant) for _ in range(2)]
    job_id = jobs.submit(push=0)
    jobs.execute(
        text("UPDATE jobs SET tenant = 't' WHERE id = :i RETURNING id").bindparams(i=job_id)
    )
    path = f"/v1/jobs/{job_id}"
    async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        headers = [{"authorization": f"Bearer {key}"} for key in keys]
        streams = [client.stream("GET", f"{path}/events", headers=headers[0]) for _ in range(3)]
        for stream in streams:
            assert (await stream.__aenter__()).status_code == 200
        for refused in (
            await client.get(f"{path}/events", headers=headers[0]),
            await client.get(path, params={"wait": "30"}, headers=headers[0]),
            await client.get("/v1/overview/events", headers=headers[0]),
        ):
            assert refused.status_code == 429
            assert "VDIFF_MAX_FOLLOWERS_PER_KEY" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) > 0
        assert (
            await client.get(path, headers=headers[0])
        ).status_code == 200  # a poll that does not wait
        other = client.stream("GET", f"{path}/events", headers=headers[1])
        assert (await other.__aenter__()).status_code == 200
        refused = await client.get(f"{path}/events", headers=headers[1])
        assert (
            refused.status_code == 429
            and "VDIFF_MAX_FOLLOWERS allows" in refused.json()["error"]["message"]
        )
        assert f"vdiff_followers {len(streams) + 1}.0" in httpx.get(f"{api.url}/metrics").text
        for stream in (*streams, other):
            await stream.__aexit__(None, None, None)
        gauge = "vdiff_followers 0.0"
        eventually(
            lambda: gauge in httpx.get(f"{api.url}/metrics").text, what="the places are free again"
        )
        assert (
            await client.get(path, params={"wait": "0.01"}, headers=headers[0])
        ).status_code == 200
