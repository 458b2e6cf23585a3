"""Maintenance: goes on without workers, one process at a time, and no duty that raises stops
another.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy import func, select, text

from shared import maintenance as module
from shared.background import EXIT_THREAD_GONE
from shared.events import EventPublisher, events_key
from shared.jobs import lease_clock, repository
from shared.jobs.status import JobStatus
from shared.maintenance import HOUSEKEEPING_LOCK, SWEEP_LOCK, Maintenance
from tests.integration import conftest
from tests.integration.conftest import ApiProcess, Jobs, WorkerProcess, eventually
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]
WEBHOOK = "'events', jsonb_build_array('job.expired'), 'url', 'https://x.example'"


@pytest.fixture
def start_api(jobs: Jobs, tmp_path: Path) -> Iterator[Callable[..., ApiProcess]]:
    started: list[ApiProcess] = []

    def start(**settings: object) -> ApiProcess:
        values = {
            "sweep_seconds": 0.3,
            "lease_seconds": 3,
            "heartbeat_seconds": 1,
            "repush_after_seconds": 2,
            **settings,
        }
        started.append(ApiProcess(jobs, tmp_path / f"api-{len(started)}.log", **values))
        return started[-1]

    yield start
    for api in started:
        api.end()


def maintenance(jobs: Jobs, **options: Any) -> Maintenance:
    publisher = EventPublisher(jobs.redis, stream_length=100, stream_seconds=60)
    values = {"sweep_seconds": 0.1, "repush_after_seconds": 2.0, "lease_seconds": 3.0, **options}
    return Maintenance(jobs.database, jobs.redis, publisher, **values)


def change(jobs: Jobs, job_id: str, assignments: str) -> None:
    with jobs.database.write() as session:
        session.execute(text(f"UPDATE jobs SET {assignments} WHERE id = :id"), {"id": job_id})


def abandon(jobs: Jobs, job_id: str, *, overdue: str = "1 second") -> None:
    """Have the job run at a worker that is gone."""
    jobs.execute(repository.claim(job_id, worker_id="worker_gone", lease_seconds=60))
    change(jobs, job_id, f"lease_until = now() - interval '{overdue}'")


def age_lease_clock(jobs: Jobs) -> None:
    """Let leases run out at once: the new database looks as if it took writes for a minute."""
    with jobs.database.write() as session:
        session.execute(lease_clock.pulse(lease_seconds=3))
        session.execute(text("UPDATE lease_clock SET since = now() - interval '1 minute'"))


def test_deadlines_retention_keys_and_leases_without_any_worker(jobs: Jobs, start_api: Any) -> None:
    late, kept, old, lost = (jobs.submit(push=0) for _ in range(4))
    change(
        jobs,
        late,
        f"start_by = now() + interval '1 second', webhook = jsonb_build_object({WEBHOOK})",
    )
    change(
        jobs,
        kept,
        "status = 'succeeded', finished_at = now(), result = '{}', purge_after = now() - interval '1 second'",
    )
    change(jobs, old, "idempotency_key = 'k', created_at = now() - interval '25 hours'")
    abandon(jobs, lost)
    api = start_api().wait_ready(path="/health")
    assert jobs.wait_status(late, JobStatus.EXPIRED).error["code"] == "start_by_passed"
    assert jobs.wait_status(lost, JobStatus.QUEUED).losses == 1
    eventually(lambda: jobs.row(kept).purged_at is not None, what="purged")
    eventually(lambda: jobs.row(old).idempotency_key is None, what="key freed")
    eventually(lambda: jobs.redis.xlen(events_key(late)), what="done is announced")
    assert jobs.execute(text("SELECT status FROM webhook_deliveries"))[0].status == "pending"
    shown = httpx.get(f"{api.url}/metrics").text
    for line in ("leases_expired", "deadlines_passed", "jobs_purged"):
        assert f'vdiff_sweeper_actions_total{{action="{line}"}} 1.0' in shown
    assert "vdiff_lease_overdue_seconds 0.0" in shown
    assert 'vdiff_api_duty_failures_total{duty="recover_leases"} 0.0' in shown


def test_a_lease_that_is_not_recovered_is_a_metric(jobs: Jobs, start_api: Any) -> None:
    abandon(jobs, jobs.submit(push=0), overdue="100 seconds")
    # The lease clock begins with the process, so that the lease runs out after ten minutes.
    api = start_api(lease_seconds=600).wait_ready(path="/health")
    [line] = re.findall(
        r"^vdiff_lease_overdue_seconds (\S+)$", httpx.get(f"{api.url}/metrics").text, re.MULTILINE
    )
    assert float(line) >= 100


@pytest.mark.parametrize(
    "broken", ["recover_leases", "expire_jobs", "fail_unservable", "push_missing"]
)
def test_a_duty_that_raises_stops_no_other(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def planted(self: Maintenance) -> None:
        raise AttributeError("planted")

    planted.__name__ = broken
    monkeypatch.setattr(Maintenance, broken, planted)
    failures = Counter("t_failures", "of duties", ["duty"], registry=CollectorRegistry())
    late, lost, missing = (jobs.submit(push=0) for _ in range(3))
    change(jobs, late, "start_by = now() - interval '1 second'")
    change(jobs, missing, "pushed_at = now() - interval '1 minute'")
    abandon(jobs, lost)
    age_lease_clock(jobs)
    working = maintenance(jobs, failures=failures)
    assert working.sweep() and working.sweep()
    wanted = {"recover_leases": (lost, "queued"), "expire_jobs": (late, "expired")}
    for name, (job_id, status) in wanted.items():
        assert (jobs.row(job_id).status == status) is (name != broken)
    pushed_again = jobs.row(missing).pushed_at > jobs.row(missing).created_at
    assert pushed_again is (broken != "push_missing")
    assert failures.labels(duty=broken)._value.get() >= 1


def test_many_processes_share_the_rounds(jobs: Jobs) -> None:
    sweeps = [maintenance(jobs, sweep_seconds=3600).sweeper for _ in range(3)]
    for sweeper in sweeps:
        sweeper._duties[0].perform()  # the first round of each thread
    assert (
        jobs.execute(
            text("SELECT total FROM maintenance_counts WHERE action = 'rounds_of_sweeper'")
        )[0].total
        == 1
    )


def test_rounds_continue_when_the_new_primarys_clock_is_behind(jobs: Jobs) -> None:
    sweepers = [maintenance(jobs, sweep_seconds=3600).sweeper for _ in range(2)]
    sweepers[0]._duties[0].perform()
    ahead = "UPDATE maintenance_counts SET updated_at = now() + interval '1 day' RETURNING action"
    jobs.execute(text(ahead))
    sweepers[1]._duties[0].perform()
    rounds = text(
        "SELECT total, updated_at <= now() AS is_past FROM maintenance_counts "
        "WHERE action = 'rounds_of_sweeper'"
    )
    assert [tuple(row) for row in jobs.execute(rounds)] == [(2, True)]


def test_a_round_that_failed_is_left_to_other_processes(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = jobs.submit(push=0)
    change(jobs, late, "start_by = now() - interval '1 second'")
    failing, working = (maintenance(jobs, sweep_seconds=3600) for _ in range(2))
    [expire] = [duty for duty in failing._recovery if duty.name == "expire_jobs"]
    monkeypatch.setattr(expire, "_run", lambda: 1 / 0)
    for process in (failing, working):
        process.sweeper._duties[0].perform()
    assert expire.streak == 1
    assert jobs.row(late).status == "expired"


def test_without_redis_leases_are_recovered_and_deadlines_kept(jobs: Jobs) -> None:
    away = redis.Redis(port=1, socket_connect_timeout=1)
    late, lost = jobs.submit(push=0), jobs.submit(push=0)
    change(jobs, late, "start_by = now() - interval '1 second'")
    abandon(jobs, lost)
    age_lease_clock(jobs)
    publisher = EventPublisher(away, stream_length=100, stream_seconds=60)
    working = Maintenance(
        jobs.database, away, publisher, sweep_seconds=1, repush_after_seconds=2, lease_seconds=3
    )
    assert working.sweep()
    assert (jobs.row(lost).status, jobs.row(late).status) == ("queued", "expired")


@pytest.mark.parametrize(
    ("lock", "round_of"), [(SWEEP_LOCK, "sweep"), (HOUSEKEEPING_LOCK, "keep_house")]
)
def test_one_process_at_a_time_and_a_dead_one_is_followed(
    jobs: Jobs, lock: int, round_of: str
) -> None:
    working = maintenance(jobs)
    with jobs.database.write() as holder:
        assert holder.execute(select(func.pg_try_advisory_xact_lock(lock))).scalar_one()
        assert getattr(working, round_of)() is False
        backend = holder.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with jobs.database.write() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": backend})
        eventually(getattr(working, round_of), what="the lock of a dead process is free")
        holder.invalidate()


def test_a_process_that_hangs_in_a_duty_is_followed(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends the session that holds the lock, as for a process that is stopped or cut off."""
    monkeypatch.setattr(module, "LOCK_IDLE_SECONDS", 1)
    entered, release = threading.Event(), threading.Event()
    hung, other = maintenance(jobs), maintenance(jobs)

    def hang() -> None:
        entered.set()
        release.wait(30)

    monkeypatch.setattr(hung._recovery[0], "_run", hang)
    hung.sweeper.start()
    try:
        assert entered.wait(20)
        assert other.sweep() is False
        eventually(other.sweep, what="the lock is handed over")
    finally:
        release.set()
        hung.sweeper.close()


def test_a_worker_that_dies_while_it_holds_the_lock_is_followed_by_the_api(
    jobs: Jobs, start_worker: Start, start_api: Any
) -> None:
    worker = start_worker(sweep_seconds=0.05).wait_ready()
    start_api().wait_ready()
    worker.signal(signal.SIGKILL)
    worker.wait()
    lost = jobs.submit(push=0)
    abandon(jobs, lost)
    jobs.wait_status(lost, JobStatus.QUEUED)


RUN_BROKEN = """
import sys
from shared.settings import load_settings
{plant}
{run}
"""
PLANT = """
import time
from shared.maintenance import Maintenance
def planted(self):
    time.sleep(0.5)
    raise SystemExit("planted")
Maintenance.recover_leases = planted
"""


def test_a_process_without_one_of_its_threads_exits_and_says_why(
    jobs: Jobs, tmp_path: Path
) -> None:
    running = jobs.submit(slow=True, n=4)
    worker_script = RUN_BROKEN.format(plant=PLANT, run=conftest.RUN_WORKER)
    worker = WorkerProcess(
        jobs, tmp_path / "broken.log", program=("-c", worker_script), drain_seconds=30
    )
    try:
        assert worker.wait(60) == EXIT_THREAD_GONE
        said = worker.log.read_text()
        assert "vdiff worker: thread vdiff-sweeper ended: SystemExit: planted" in said
        row = worker.row()
        assert row is not None and row.state == "stopped"
        assert (jobs.row(running).status, jobs.row(running).failures) == ("queued", 0), (
            "given back, not charged"
        )
    finally:
        worker.end()
    environment = {
        "VDIFF_DATABASE_URL": jobs.database_url,
        "VDIFF_REDIS_URL": jobs.redis_url,
        "VDIFF_SWEEP_SECONDS": "0.2",
        "VDIFF_PORT": str(free_port()),
        "PATH": "/usr/bin:/bin",
    }
    api_script = RUN_BROKEN.format(
        plant=PLANT, run="from api.server import run; sys.exit(run(load_settings()))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", api_script],
        cwd=conftest.ROOT,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert ended.returncode == EXIT_THREAD_GONE
    assert b"vdiff api: thread vdiff-sweeper ended: SystemExit: planted" in ended.stderr
