"""Jobs that were lost with their worker: all but the one that kills workers succeed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from shared.jobs import lanes, repository, suspects
from shared.jobs.formats import ROW_FORMAT, SUSPECT_FORMAT
from shared.jobs.status import JobStatus
from tests.integration.conftest import Jobs, WorkerProcess, eventually
from tests.integration.killers import KILLER_TOKEN
from vdiff import doctor

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]
DEADLY = ("-m", "tests.integration.killers")
DEATHS_MAX = 12


def lose(
    jobs: Jobs, job_ids: list[str], *, worker: str = "w", apart: bool = False, alone: bool = False
) -> None:
    """Claim the jobs as one worker, which dies."""
    for job_id in job_ids:
        claim = repository.claim(
            job_id, worker_id=worker, lease_seconds=-1, apart=apart, alone=alone
        )
        assert len(jobs.execute(claim)) == 1
    assert {row.id for row in jobs.execute(repository.sweep_expired())} == set(job_ids)


def test_only_a_job_that_dies_alone_is_quarantined(jobs: Jobs) -> None:
    ids = [jobs.submit(push=0, max_attempts=2) for _ in range(8)]
    lose(jobs, ids)
    assert {(jobs.row(i).status, jobs.row(i).failures, jobs.row(i).losses) for i in ids} == {
        ("queued", 0, 1)
    }
    assert {jobs.row(i).isolation for i in ids} == {2}
    for _ in range(6):  # a group may be lost as often as it will
        lose(jobs, ids[:2], apart=True)
    pair = [jobs.row(i) for i in ids[:2]]
    assert [(r.status, r.losses, r.lost_alone, r.isolation) for r in pair] == [
        ("queued", 7, 0, 1)
    ] * 2
    lose(jobs, ids[:1], apart=True, alone=True)
    assert (jobs.row(ids[0]).status, jobs.row(ids[0]).lost_alone) == ("queued", 1)
    # Its worker let others in: from then on nothing is held against the job.
    jobs.execute(repository.claim(ids[0], worker_id="w", lease_seconds=-1, apart=True, alone=True))
    with jobs.database.write() as session:
        session.execute(suspects.let_others_in((ids[0], jobs.row(ids[0]).attempt)))
    jobs.execute(repository.sweep_expired())
    assert (jobs.row(ids[0]).status, jobs.row(ids[0]).lost_alone) == ("queued", 1)
    # A drain counts nothing at all.
    jobs.execute(repository.claim(ids[0], worker_id="w", lease_seconds=60, apart=True, alone=True))
    jobs.execute(repository.drain([(ids[0], jobs.row(ids[0]).attempt)]))
    lose(jobs, ids[:1], apart=True, alone=True)
    row = jobs.row(ids[0])
    assert (row.status, row.failures, row.lost_alone, row.error["code"]) == (
        "failed",
        0,
        2,
        "job_quarantined",
    )
    assert row.error["retryable"] is False
    # The client may retry it; the next life starts alone.
    assert len(jobs.execute(repository.retry(ids[0], "anonymous", key_id=""))) == 1
    row = jobs.row(ids[0])
    assert (row.status, row.losses, row.lost_alone, row.isolation) == ("queued", 0, 0, 1)


def test_a_suspect_is_left_alone_by_everything_that_runs_jobs_together(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    lose(jobs, [job_id])
    assert jobs.row(job_id).format == SUSPECT_FORMAT
    older = repository.claim(
        job_id, worker_id="old", lease_seconds=60, understands=ROW_FORMAT, apart=True
    )
    assert jobs.execute(older) == []  # the release before knows no suspects
    assert jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60)) == []
    with jobs.database.write() as session:
        session.execute(lanes.roll_up())
        assert (
            session.execute(
                lanes.candidates(jobs.model, "normal", clock=0.0, lanes=9, per_lane=9)
            ).all()
            == []
        )
        waiting = session.execute(suspects.waiting(jobs.model, revision=None, limit=5)).all()
    assert [(row.id, row.isolation, row.losses) for row in waiting] == [(job_id, 1, 1)]
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60, apart=True))
    jobs.execute(repository.finish(job_id, 2, JobStatus.FAILED, error=repository.CANCELLED_ERROR))
    jobs.execute(repository.retry(job_id, "anonymous", key_id=""))
    assert (jobs.row(job_id).isolation, jobs.row(job_id).format) == (None, ROW_FORMAT)


def test_an_engine_that_stops_is_no_failure_of_its_jobs(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0, max_attempts=1)
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
    error = {"code": "engine_stopped", "message": "m", "param": None, "retryable": True}
    moved = jobs.execute(repository.lose_attempt(job_id, 1, group_size=8, error=error))
    assert [(row.status, row.isolation) for row in moved] == [("queued", 2)]
    assert (jobs.row(job_id).failures, jobs.row(job_id).losses, jobs.outcomes(job_id)) == (
        0,
        1,
        ["lost"],
    )


@pytest.mark.timeout(900)  # seven starts of a worker
def test_of_eight_jobs_the_one_that_kills_its_worker_fails(jobs: Jobs, start_worker: Start) -> None:
    """Real processes: each death takes the whole group; the seven others succeed, and stay apart
    from later jobs.
    """
    ids = [jobs.submit(max_tokens=64) for _ in range(7)]
    killer = jobs.submit(prompt=[5, KILLER_TOKEN, 7], max_tokens=64)
    deaths = 0
    worker = start_worker(program=DEADLY, max_num_seqs=8)
    while jobs.row(killer).status != JobStatus.FAILED:
        assert deaths <= DEATHS_MAX
        eventually(
            lambda w=worker: (
                w.process.poll() is not None or jobs.row(killer).status == JobStatus.FAILED
            ),
            seconds=240,
            what="the worker dies or the killer is quarantined",
        )
        if worker.process.poll() is not None:
            assert worker.process.returncode == -signal.SIGKILL, worker.tail()
            deaths += 1
            worker = start_worker(program=DEADLY, max_num_seqs=8)
    for job_id in ids:
        row = jobs.wait_done(job_id, seconds=90)
        assert (row.status, row.failures) == ("succeeded", 0)
    row = jobs.row(killer)
    assert (row.error["code"], row.failures, row.lost_alone) == (
        "job_quarantined",
        0,
        row.max_attempts,
    )
    alone = jobs.execute(
        text("SELECT alone FROM attempts WHERE job_id = :i ORDER BY attempt").bindparams(i=killer)
    )
    assert [r.alone for r in alone][-row.max_attempts :] == [True] * row.max_attempts
    with jobs.database.read() as session:
        checks = list(doctor.isolated([], session.execute(suspects.quarantined(limit=5)).all()))
    assert killer in checks[0].text


@pytest.mark.timeout(600)
def test_suspects_get_their_turn_on_a_busy_worker(jobs: Jobs, start_worker: Start) -> None:
    """Healthy jobs and suspects both finish, although there is always a healthy job to take."""
    apart = [jobs.submit(push=0) for _ in range(3)]
    lose(jobs, apart)
    start_worker(max_num_seqs=2).wait_ready()
    healthy = [jobs.submit(max_tokens=32) for _ in range(30)]
    for job_id in (*apart, *healthy):
        assert jobs.wait_done(job_id, seconds=90).status == "succeeded"
    assert {jobs.outcomes(i)[-1] for i in apart} == {"succeeded"}
    spans: list[Any] = jobs.execute(
        text(
            "SELECT count(*) AS n FROM attempts a JOIN attempts b ON a.job_id <> b.job_id AND a.worker_id = b.worker_id"
            " AND a.started_at < b.ended_at AND b.started_at < a.ended_at WHERE a.alone"
        )
    )
    assert spans[0].n == 0  # nothing ran beside a job that ran alone
