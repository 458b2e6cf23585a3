"""The recipe of docs/operations.md with a real PgBouncer in transaction mode, where one is
installed.

It has one connection to PostgreSQL for many clients, so whatever a session keeps beyond its
transaction would be seen.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from shared.db.session import AsyncDatabase, Database
from tests.integration.conftest import ROOT, ApiProcess, Jobs, WorkerProcess, eventually, new_key
from tests.integration.test_api_jobs import chat_job
from tests.integration.test_api_keys import auth
from vdiff import bundled
from vdiff.embedded.process import free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        shutil.which("pgbouncer") is None,
        reason="no pgbouncer on PATH (Debian: apt-get install pgbouncer)",
    ),
]


def recipe() -> dict[str, str]:
    """The settings of pgbouncer.ini in the page on operations."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    found = re.search(r"```ini\n\[databases\]\n(.*?)```", page, re.DOTALL)
    assert found, "docs/operations.md has no pgbouncer.ini"
    lines = [
        line.partition(";")[0].partition(" = ")
        for line in found.group(1).splitlines()
        if " = " in line
    ]
    return {name.strip(): value.strip() for name, _, value in lines}


@pytest.fixture(scope="module")
def pooled_url(jobs_module: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Path("/tmp") / f"vdiff-pgbouncer-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    direct, port = make_url(jobs_module.database_url), free_port()
    users = folder / "users.txt"
    users.write_text(f'"{direct.username}" "{direct.password}"\n')
    settings = recipe()
    target = settings.pop("vdiff")
    assert target == "host=postgres port=5432 dbname=vdiff"
    settings |= {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "auth_file": str(users),
        "unix_socket_dir": "",
        "default_pool_size": "4",  # a round of the sweeper and one of housekeeping hold one each
        "logfile": str(folder / "log"),
    }
    where = f"host={direct.host} port={direct.port} dbname={direct.database}"
    body = "".join(f"{name} = {value}\n" for name, value in settings.items())
    (folder / "pgbouncer.ini").write_text(f"[databases]\nvdiff = {where}\n[pgbouncer]\n{body}")
    root = getpass.getuser() == "root"
    command = ["pgbouncer", *(["-u", "nobody"] if root else []), str(folder / "pgbouncer.ini")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = direct.set(host="127.0.0.1", port=port, database="vdiff").update_query_dict(
        {"pgbouncer": "true"}
    )
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            with suppress(psycopg.Error):
                psycopg.connect(
                    url.set(drivername="postgresql", query={}).render_as_string(hide_password=False)
                ).close()
                return True
            return False

        eventually(answers, what="pgbouncer")
        yield url.render_as_string(hide_password=False)
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def test_both_drivers_share_four_connections(pooled_url: str) -> None:
    """Thirty clients on four server sessions: prepared statements and settings of one would meet the
    others.
    """

    async def run() -> None:
        database = AsyncDatabase(pooled_url, pool_size=10, max_overflow=20)
        try:

            async def one(number: int) -> None:
                for i in range(5):
                    async with database.read() as session:
                        statement = text(
                            "SELECT CAST(:n AS int) + 1 AS n, CAST(:words AS text[]) AS words"
                        )
                        row = (
                            await session.execute(statement, {"n": number + i, "words": ["a"]})
                        ).one()
                        assert (row.n, row.words) == (number + i + 1, ["a"])
                    async with database.write() as session:
                        await session.execute(
                            text("SELECT pg_advisory_xact_lock(:n)"), {"n": number}
                        )

            await asyncio.gather(*(one(i) for i in range(30)))
        finally:
            await database.dispose()

    asyncio.run(run())
    database = Database(pooled_url)
    for i in range(20):  # beyond psycopg's own threshold for preparing
        with database.read() as session:
            assert session.execute(text("SELECT CAST(:n AS int)"), {"n": i}).scalar_one() == i
        with database.write() as session:
            assert session.execute(text("SELECT CAST(:n AS int)"), {"n": i}).scalar_one() == i
    database.dispose()


def test_a_read_that_writes_is_committed(pooled_url: str, jobs_module: Jobs) -> None:
    """`last_used_at` of a key is written in a read session, which is a transaction here."""

    async def run() -> None:
        database = AsyncDatabase(pooled_url)
        try:
            async with database.read() as session:
                await session.execute(text("UPDATE api_keys SET name = 'renamed'"))
        finally:
            await database.dispose()

    new_key(jobs_module)
    asyncio.run(run())
    assert {row.name for row in jobs_module.execute(text("SELECT name FROM api_keys"))} == {
        "renamed"
    }


def test_api_and_worker_do_their_work_through_it(
    pooled_url: str, jobs_module: Jobs, tmp_path: Path
) -> None:
    key = auth(new_key(jobs_module))
    worker = WorkerProcess(
        jobs_module,
        tmp_path / "worker.log",
        database_url=pooled_url,
        served_model_name="vdiff-tiny",
        model=bundled.folder(bundled.DEFAULT_MODEL),
        enable_apd="false",
    )
    api = ApiProcess(jobs_module, tmp_path / "api.log", database_url=pooled_url, auth="required")
    try:
        worker.wait_ready()
        api.wait_ready()
        with httpx.Client(base_url=api.url, timeout=120, headers=key) as client:
            for _ in range(5):
                job = client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=50"}).json()
                assert jobs_module.wait_done(job["id"]).status == "succeeded", job
            for path in ("/v1/jobs", "/v1/usage", "/v1/queue", "/v1/overview", "/health"):
                assert client.get(path).status_code == 200, path
    finally:
        api.end()
        worker.end()
    for name in ("api.log", "worker.log"):
        log = (tmp_path / name).read_text(errors="replace")
        assert "prepared statement" not in log and "ProgrammingError" not in log, name


def test_without_the_option_pgbouncer_refuses_the_timeouts(pooled_url: str) -> None:
    """The recipe needs `pgbouncer=true` for this reason."""
    plain = make_url(pooled_url).set(query={}).render_as_string(hide_password=False)
    database = Database(plain)
    with (
        pytest.raises(Exception, match=r"unsupported startup parameter"),
        database.read() as session,
    ):
        session.execute(text("SELECT 1"))
    database.dispose()
