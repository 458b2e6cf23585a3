"""PostgreSQL stops, freezes or turns read-only for longer than a lease: no attempt is lost, and no
result either.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis
from sqlalchemy import text

from migrations.run import upgrade
from shared.db.session import Database
from shared.events import EventPublisher
from shared.jobs import lease_clock, repository
from shared.jobs.status import JobStatus
from shared.maintenance import Maintenance
from tests.integration.conftest import Jobs, WorkerProcess, eventually
from tests.integration.test_failover import make_read_only, make_writable
from vdiff.embedded import EmbeddedPostgres

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]
LEASE_SECONDS = 3  # of `WorkerProcess`
OUTAGE_SECONDS = 3 * LEASE_SECONDS


class Server:
    """A PostgreSQL of one test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._server = EmbeddedPostgres(folder)
        self.url = self._server.start()
        stack.callback(lambda: self._server.stop())

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        assert self._server.start() == self.url

    def processes(self) -> list[int]:
        """The postmaster and its children."""
        process = self._server.process
        assert process is not None
        found = [process.pid]
        for folder in Path("/proc").iterdir():
            try:
                if (
                    folder.name.isdigit()
                    and f"\nPPid:\t{process.pid}\n" in (folder / "status").read_text()
                ):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def freeze(self) -> list[int]:
        frozen = self.processes()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        return frozen

    @staticmethod
    def thaw(frozen: list[int]) -> None:
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def server() -> Iterator[Server]:
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                TemporaryDirectory(prefix="vdiff-outage-", ignore_cleanup_errors=True)
            )
        )
        folder.chmod(0o755)
        yield Server(folder, stack)


@pytest.fixture
def jobs(server: Server, redis_url: str) -> Iterator[Jobs]:
    upgrade(server.url)
    jobs = Jobs(server.url, redis_url)
    yield jobs
    jobs.close()


@pytest.mark.parametrize("way", ["stop", "freeze", "read_only"])
def test_an_outage_longer_than_a_lease_costs_no_attempt(
    jobs: Jobs, server: Server, start_worker: Start, way: str
) -> None:
    """Some of the jobs end during the outage, and their results are kept; nobody takes a job from a
    live worker.
    """
    start_worker().wait_ready()
    start_worker().wait_ready()  # another one, whose sweeper may take jobs from the first
    ids = [jobs.submit(slow=True), *(jobs.submit(max_tokens=200, seed=n) for n in range(5))]
    eventually(lambda: sum(jobs.row(i).status == "running" for i in ids) >= 3, what="jobs run")
    if way == "stop":
        server.stop()
        time.sleep(OUTAGE_SECONDS)
        server.start()
    elif way == "freeze":
        frozen = server.freeze()
        time.sleep(OUTAGE_SECONDS)
        server.thaw(frozen)
    else:
        make_read_only(jobs)
        time.sleep(OUTAGE_SECONDS)
        make_writable(jobs)
    jobs.database.dispose()
    for job_id in ids:
        row = jobs.wait_done(job_id, seconds=60)
        assert (row.status, row.attempt, row.losses, row.failures) == ("succeeded", 1, 0, 0)
        assert jobs.outcomes(job_id) == ["succeeded"]


def maintenance(jobs: Jobs) -> Maintenance:
    client = redis.Redis.from_url(jobs.redis_url)
    return Maintenance(
        jobs.database,
        client,
        EventPublisher(client, stream_length=10, stream_seconds=10),
        sweep_seconds=1,
        repush_after_seconds=1,
        lease_seconds=30,
    )


def set_clock(jobs: Jobs, *, at: str, since: str) -> None:
    with jobs.database.write() as session:
        session.execute(lease_clock.pulse(lease_seconds=30))
        session.execute(
            text(
                f"UPDATE lease_clock SET at = now() + interval '{at}', since = now() + interval '{since}'"
            )
        )


@pytest.mark.parametrize(
    ("at", "since", "recovers"),
    [
        ("-1 s", "-60 s", True),
        ("-1 s", "-29 s", False),  # the outage was over less than a lease ago
        ("-13 s", "-600 s", False),  # it is over now
        ("-1 day", "-2 days", False),  # a new primary, or a cluster that was started after a day
        ("1 day", "-2 days", False),  # a new primary whose clock is behind
    ],
)
def test_leases_run_out_only_while_they_could_be_renewed(
    jobs: Jobs, at: str, since: str, recovers: bool
) -> None:
    job_id = jobs.submit(push=0)
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=-1))
    set_clock(jobs, at=at, since=since)
    maintenance(jobs).sweep()
    assert jobs.row(job_id).status == ("queued" if recovers else "running")
    # The clock goes on from the present one: a lease later the job is taken from its worker.
    with jobs.database.write() as session:
        ahead, behind = session.execute(
            text("SELECT at > now() + interval '1 s', since > now() FROM lease_clock")
        ).one()
        assert not ahead and not behind
        session.execute(text("UPDATE lease_clock SET since = now() - interval '31 s'"))
    maintenance(jobs).sweep()
    assert jobs.row(job_id).status == "queued"


def test_an_end_whose_commit_was_not_answered_counts(jobs: Jobs) -> None:
    """The connection breaks after COMMIT: the worker reads back that its end, or its claim,
    happened.
    """
    from shared.db.retries import persist
    from shared.jobs import suspects

    job_id = jobs.submit(push=0)
    database = Database(jobs.database_url)
    claim = repository.claim(job_id, worker_id="w", lease_seconds=60)
    end = repository.finish(job_id, 1, JobStatus.SUCCEEDED, result={"a": 1})

    def cut_after(statement, read_back):  # type: ignore[no-untyped-def]
        tries = []

        def work(session, again):  # type: ignore[no-untyped-def]
            tries.append(again)
            if not again:
                with jobs.database.write() as other:  # the COMMIT that happened
                    other.execute(statement)
                session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            row = session.execute(statement).one_or_none()
            return session.execute(read_back).one_or_none() if row is None and again else row

        row = persist(database, work)
        assert tries[0] is False and tries[-1] is True
        return row

    try:
        claimed = cut_after(claim, suspects.claimed_by(job_id, "w"))
        assert (claimed.id, claimed.attempt, list(claimed.prompt_token_ids)) == (
            job_id,
            1,
            [5, 6, 7],
        )
        ended = cut_after(end, suspects.ended_attempt(job_id, 1))
        assert (ended.id, ended.attempt, ended.status) == (job_id, 1, "succeeded")
        assert jobs.execute(suspects.ended_attempt(job_id, 2)) == []
    finally:
        database.dispose()
