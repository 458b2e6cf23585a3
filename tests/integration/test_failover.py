"""A failover: the database refuses writes for a while, then takes them again. Nothing stays
read-only afterwards.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from shared.db import faults
from shared.db.session import AsyncDatabase, Database, is_outage, sync_engine_unpooled
from tests.integration.conftest import ApiProcess, Jobs, WorkerProcess, eventually

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]
TOUCH = text("UPDATE jobs SET progress = progress WHERE id = 'job_none'")


def administer(jobs: Jobs, *statements: str) -> None:
    """Execute statements of an administrator, in a session of its own that may always write."""
    engine = sync_engine_unpooled(jobs.database_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("SET default_transaction_read_only = off"))
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def make_read_only(jobs: Jobs, *, cut: bool = True) -> None:
    """Let new sessions be read-only; `cut` ends the present ones, as a failover does."""
    name = make_url(jobs.database_url).database
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    cuts = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
    administer(
        jobs,
        f'ALTER DATABASE "{name}" SET default_transaction_read_only = on',
        *([cuts] if cut else []),
    )


def make_writable(jobs: Jobs) -> None:
    administer(
        jobs,
        f'ALTER DATABASE "{make_url(jobs.database_url).database}" RESET default_transaction_read_only',
    )


@contextmanager
def held_sessions(database: Database, count: int) -> Iterator[None]:
    """Open that many sessions at once, so that the pool keeps them."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(database.read()).execute(text("SELECT 1"))
        yield


def test_a_pool_of_threads_writes_at_once_when_the_database_does(jobs: Jobs) -> None:
    database = Database(jobs.database_url, pool_size=5)
    try:
        with held_sessions(database, 5):
            pass
        make_read_only(jobs)
        with pytest.raises(DBAPIError) as caught, database.write() as session:
            session.execute(TOUCH)
        assert is_outage(caught.value)
        with held_sessions(
            database, 5
        ):  # reading works meanwhile, and leaves read-only sessions in the pool
            pass
        with database.read() as session:
            assert session.execute(text("SHOW default_transaction_read_only")).scalar_one() == "on"
        make_writable(jobs)
        for _ in range(6):
            with database.write() as session:
                session.execute(TOUCH)
    finally:
        database.dispose()


def test_a_pool_of_an_event_loop_writes_at_once_when_the_database_does(jobs: Jobs) -> None:
    async def main() -> None:
        database = AsyncDatabase(jobs.database_url, pool_size=5)

        async def read() -> None:
            async with database.read() as session:
                await session.execute(text("SELECT pg_sleep(0.1)"))

        async def write() -> None:
            async with database.write() as session:
                await session.execute(TOUCH)

        try:
            await asyncio.gather(*(read() for _ in range(5)))
            make_read_only(jobs)
            with pytest.raises(DBAPIError):
                await write()
            await asyncio.gather(*(read() for _ in range(5)))
            make_writable(jobs)
            await asyncio.gather(*(write() for _ in range(10)))
        finally:
            await database.dispose()

    asyncio.run(main())


def test_a_session_that_answers_read_only_is_closed(jobs: Jobs) -> None:
    """Also where the driver is not told, as behind a pooler: the error itself condemns the
    connection.
    """
    database = Database(jobs.database_url, pool_size=1, max_overflow=0)
    try:
        with database.read() as session:
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with pytest.raises(DBAPIError) as caught, database.write() as session:
            session.execute(text("SET TRANSACTION READ ONLY"))
            session.execute(TOUCH)
        assert caught.value.connection_invalidated
        with database.read() as session:
            assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() != pid
        # A refused statement condemns nothing.
        with database.read() as session:
            pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with pytest.raises(DBAPIError) as caught, database.write() as session:
            session.execute(text("SELECT 1 / 0"))
        assert not caught.value.connection_invalidated
        with database.read() as session:
            assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() == pid
    finally:
        database.dispose()


def test_a_value_that_cannot_be_sent_is_no_outage(jobs: Jobs) -> None:
    statement = text("SELECT CAST(:value AS text)")
    with pytest.raises(DBAPIError) as caught, jobs.database.write() as session:
        session.execute(statement, {"value": "a\x00b"})
    assert not is_outage(caught.value)

    async def main() -> None:
        database = AsyncDatabase(jobs.database_url)
        try:
            for value in ("a\x00b", 5):
                with pytest.raises(DBAPIError) as caught:
                    async with database.write() as session:
                        await session.execute(statement, {"value": value})
                assert not is_outage(caught.value)
        finally:
            await database.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("state", ["25006", "57P01", "57P02", "57P03", "08006", "08P01", "25P03"])
def test_what_condemns_a_connection(state: str) -> None:
    class Refused(Exception):
        sqlstate = state

    assert faults.condemns(Refused())
    assert faults.condemns(TimeoutError())
    Refused.sqlstate = "23505"
    assert not faults.condemns(Refused())
    assert not faults.condemns(ValueError())


def test_submissions_are_taken_at_once_after_a_failover(
    jobs: Jobs, start_worker: Start, tmp_path: Path
) -> None:
    start_worker().wait_ready()
    with ExitStack() as stack:
        api = ApiProcess(jobs, tmp_path / "api.log")
        stack.callback(api.end)
        api.wait_ready()
        client = stack.enter_context(httpx.Client(base_url=api.url, timeout=120))
        threads = stack.enter_context(ThreadPoolExecutor(12))

        def submit(_: int) -> int:
            body = {"model": jobs.model, "prompt": "a", "max_tokens": 2}
            return client.post(
                "/v1/jobs", json={"endpoint": "/v1/completions", "body": body}
            ).status_code

        def look(_: int) -> int:
            return client.get("/v1/jobs?limit=1").status_code

        assert set(threads.map(submit, range(24))) == {202}
        make_read_only(jobs)
        refused = list(threads.map(submit, range(24)))
        assert set(refused) == {503}
        list(threads.map(look, range(24)))
        make_writable(jobs)
        assert list(threads.map(submit, range(48))) == [202] * 48


def test_a_worker_that_starts_meanwhile_keeps_its_model_and_registers_later(
    jobs: Jobs, start_worker: Start
) -> None:
    """It says why it waits. Another one that is told to end while it waits ends in good order."""
    make_read_only(jobs)
    workers = [start_worker(), start_worker()]

    def waits(worker: WorkerProcess) -> bool:
        assert worker.process.poll() is None, worker.tail()
        return "cannot execute INSERT in a read-only transaction" in worker.tail()

    eventually(
        lambda: all(waits(worker) for worker in workers), seconds=180, what="both workers wait"
    )
    workers[1].signal(signal.SIGTERM)
    assert workers[1].wait() == 0, workers[1].tail()
    assert "worker_never_registered" in workers[1].tail()
    make_writable(jobs)
    workers[0].wait_ready()
    assert jobs.wait_done(jobs.submit()).status == "succeeded"
    assert workers[1].row() is None
