"""All moves of a job, in any order and several at once, on a real PostgreSQL against a small model
of what must come of them.

The model is written from docs/jobs.md, not from the SQL. After each step the rows, their attempts,
the lanes and the usage must be what it says. `EXAMPLES=500 pytest
tests/integration/test_jobs_state_machine.py` runs longer.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from shared.ids import new_id
from shared.jobs import caretaking, lanes, repository
from shared.jobs.formats import UNDERSTOOD_FORMAT
from shared.jobs.status import TERMINAL, TRANSITIONS, JobStatus
from shared.usage import repository as usage
from tests.integration.conftest import Jobs

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("EXAMPLES", "10"))
ERROR = {"code": "engine_error", "message": "m", "param": None, "retryable": True}
ENDS = st.sampled_from(["succeeded", "failed", "cancelled", "expired"])


@dataclass
class Model:
    """The expected state of one job."""

    max_attempts: int
    newer: bool  # its row is of a newer program
    status: str = "queued"
    attempt: int = 0
    failures: int = 0
    life: int = 1
    cancel_requested: bool = False
    late: bool = False  # complete_by has passed
    purged: bool = False
    losses: int = 0
    lost_alone: int = 0
    isolation: int | None = None  # how many suspects may run together; None: no suspect
    alone: bool = False  # its last attempt ran alone
    quarantined: bool = False
    outcomes: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def over(self) -> bool:
        return JobStatus(self.status) in TERMINAL

    @property
    def claimable(self) -> bool:
        return self.status == "queued" and not (self.cancel_requested or self.late or self.newer)

    def to(self, status: str) -> None:
        assert JobStatus(status) in TRANSITIONS[JobStatus(self.status)], (self.status, status)
        self.status = status
        if self.over:
            self.ends[status] += 1

    def claimed(self, *, alone: bool = False) -> None:
        self.to("running")
        self.attempt += 1
        self.alone = alone
        self.outcomes.append("running")

    def back(self, outcome: str, *, failure: bool) -> None:
        """running -> queued, or what stands in the way of it."""
        self.failures += failure
        self.outcomes[-1] = outcome
        if self.cancel_requested:
            self.to("cancelled")
        elif self.late:
            self.to("expired")
        else:
            self.to("failed" if failure and self.failures >= self.max_attempts else "queued")

    def lost(self, group: int) -> None:
        """Take it from a worker that is gone, with all the `group` jobs of that worker: only a loss
        alone counts.
        """
        self.losses += 1
        self.lost_alone += self.alone
        quarantined = self.alone and self.lost_alone >= self.max_attempts
        self.isolation = max(1, (self.isolation or group) // 4)
        self.outcomes[-1] = "lost"
        if self.cancel_requested:
            self.to("cancelled")
        elif self.late:
            self.to("expired")
        else:
            self.to("failed" if quarantined else "queued")
        self.quarantined = self.status == "failed"

    def ended(self, status: str) -> None:
        if status == "succeeded" and self.late:
            status = "expired"
        self.to(status)
        self.outcomes[-1] = status


def finish(job_id: str, attempt: int, status: str) -> Any:
    given: dict[str, Any] = {"result": {"a": 1}} if status == "succeeded" else {"error": ERROR}
    return repository.finish(
        job_id, attempt, JobStatus(status), usage={"completion_tokens": 2}, **given
    )


class Machine(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self, jobs: Jobs) -> None:
        super().__init__()
        self.jobs = jobs
        jobs.model = f"m-{new_id('m')}"
        self.models: dict[str, Model] = {}
        self.worker = new_id("worker")

    def do(self, statement: Any) -> list[Any]:
        return self.jobs.execute(statement)

    def at_once(self, *statements: Any) -> list[list[Any]]:
        """Each in a thread and a transaction of its own, all at the same moment."""
        found: list[list[Any]] = [[] for _ in statements]
        start = threading.Barrier(len(statements))

        def run(index: int, statement: Any) -> None:
            start.wait()
            found[index] = self.do(statement)

        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(statements)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    @rule(target=ids, max_attempts=st.integers(1, 3), newer=st.integers(0, 9))
    def submit(self, max_attempts: int, newer: int) -> str:
        job_id = self.jobs.submit(push=0, max_attempts=max_attempts)
        model = self.models[job_id] = Model(max_attempts, newer == 0)
        if model.newer:
            self._set(job_id, f"format = {UNDERSTOOD_FORMAT + 1}")
        return job_id

    def _set(self, job_id: str, what: str) -> None:
        with self.jobs.database.write() as session:
            session.execute(text(f"UPDATE jobs SET {what} WHERE id = :id"), {"id": job_id})

    def claim(self, job_id: str, *, apart: bool = False, alone: bool = False) -> Any:
        return repository.claim(
            job_id, worker_id=self.worker, lease_seconds=60, apart=apart, alone=alone
        )

    def group(self) -> int:
        """Return how many jobs the worker runs."""
        return sum(model.status == "running" for model in self.models.values())

    @rule(job_id=ids, claimers=st.integers(1, 3), apart=st.booleans(), alone=st.booleans())
    def claim_at_once(self, job_id: str, claimers: int, apart: bool, alone: bool) -> None:
        """Claim it as any job, or as a suspect that runs apart from the others."""
        model = self.models[job_id]
        alone &= apart
        claim = self.claim(job_id, apart=apart, alone=alone)
        won = [rows for rows in self.at_once(*[claim] * claimers) if rows]
        assert len(won) == (model.claimable and apart == (model.isolation is not None))
        if won:
            model.claimed(alone=alone)
            assert won[0][0].attempt == model.attempt

    @rule(job_id=ids, status=ENDS, stale=st.booleans())
    def finish(self, job_id: str, status: str, stale: bool) -> None:
        model = self.models[job_id]
        moved = self.do(finish(job_id, model.attempt - stale, status))
        assert len(moved) == (model.status == "running" and not stale)
        if moved:
            model.ended(status)
            assert moved[0].status == model.status

    @rule(job_id=ids, stale=st.booleans(), drain=st.booleans())
    def give_back(self, job_id: str, stale: bool, drain: bool) -> None:
        model = self.models[job_id]
        attempt = model.attempt - stale
        statement = (
            repository.drain([(job_id, attempt)])
            if drain
            else repository.fail_attempt(job_id, attempt, error=ERROR)
        )
        moved = self.do(statement)
        assert len(moved) == (model.status == "running" and not stale)
        if moved:
            model.back("drained" if drain else "failed", failure=not drain)
            assert moved[0].status == model.status

    @rule(job_id=ids, status=ENDS)
    def everybody_ends_it(self, job_id: str, status: str) -> None:
        """Its worker finishes, fails and drains it, and the sweeper takes it, all at once: one of
        them does.
        """
        model = self.models[job_id]
        if model.status != "running":
            return
        self._set(job_id, "lease_until = now() - interval '1 s'")
        attempt, group = model.attempt, self.group()
        ways: dict[str, Any] = {
            "finish": finish(job_id, attempt, status),
            "failed": repository.fail_attempt(job_id, attempt, error=ERROR),
            "drained": repository.drain([(job_id, attempt)]),
            "lost": repository.sweep_expired(),
        }
        found = dict(zip(ways, self.at_once(*ways.values()), strict=True))
        moved = {way: [row for row in rows if row.id == job_id] for way, rows in found.items()}
        won = [way for way, rows in moved.items() if rows]
        assert len(won) == 1, won
        if won[0] == "finish":
            model.ended(status)
        elif won[0] == "lost":
            model.lost(group)
        else:
            model.back(won[0], failure=won[0] == "failed")
        assert moved[won[0]][0].status == model.status

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        moved = self.do(repository.request_cancel(job_id))
        self._cancelled(self.models[job_id], moved)

    @staticmethod
    def _cancelled(model: Model, moved: list[Any]) -> None:
        assert len(moved) == (model.status in ("queued", "running"))
        if moved:
            model.cancel_requested = True
            if model.status == "queued":
                model.to("cancelled")
            assert moved[0].status == model.status

    @rule(job_id=ids)
    def claim_and_cancel_at_once(self, job_id: str) -> None:
        model = self.models[job_id]
        apart = model.isolation is not None
        claimed, cancelled = self.at_once(
            self.claim(job_id, apart=apart), repository.request_cancel(job_id)
        )
        if claimed:
            assert model.claimable
            model.claimed()
        else:
            assert not model.claimable or cancelled[0].status == "cancelled"
        self._cancelled(model, cancelled)

    @rule(job_id=ids)
    def lease_runs_out(self, job_id: str) -> None:
        model, group = self.models[job_id], self.group()
        if model.status == "running":
            self._set(job_id, "lease_until = now() - interval '1 s'")
        moved = [row for row in self.do(repository.sweep_expired()) if row.id == job_id]
        assert len(moved) == (model.status == "running")
        if moved:
            model.lost(group)
            assert (moved[0].status, moved[0].isolation) == (model.status, model.isolation)
        beat = repository.heartbeat({(job_id, model.attempt): {"step": 1}}, lease_seconds=60)
        assert len(self.do(beat)) == (model.status == "running")

    @rule(job_id=ids)
    def deadline_passes(self, job_id: str) -> None:
        model = self.models[job_id]
        self._set(job_id, "complete_by = now() - interval '1 s'")
        model.late = True

    @rule()
    def sweep_deadlines(self) -> None:
        moved = {row.id for row in self.do(caretaking.sweep_deadlines(grace_seconds=0))}
        for job_id, model in self.models.items():
            late = model.late and not model.over
            assert (job_id in moved) == late
            if late:
                if model.status == "running":
                    model.outcomes[-1] = "expired"
                model.to("expired")

    @rule(job_id=ids)
    def retry(self, job_id: str) -> None:
        model = self.models[job_id]
        moved = self.do(repository.retry(job_id, "anonymous", key_id=""))
        assert len(moved) == (
            model.status in ("failed", "cancelled", "expired") and not model.purged
        )
        if moved:
            model.to("queued")
            model.life += 1
            model.failures = model.losses = model.lost_alone = 0
            model.cancel_requested = model.late = False
            model.isolation = 1 if model.quarantined else None
            model.quarantined = False

    @rule(job_id=consumes(ids))
    def purge(self, job_id: str) -> None:
        model = self.models[job_id]
        moved = self.do(repository.purge(job_id, "anonymous"))
        assert len(moved) == model.over
        model.purged = bool(moved)
        assert self.do(repository.purge(job_id, "anonymous")) == []

    @rule()
    def roll_up(self) -> None:
        with self.jobs.database.write() as session:
            session.execute(lanes.roll_up())
            session.execute(usage.roll_up())

    @invariant()
    def the_rows_are_what_they_must_be(self) -> None:
        columns = (
            "id, status, attempt, failures, losses, lost_alone, isolation, life, cancel_requested, "
            "purged_at IS NOT NULL, result IS NOT NULL"
        )
        query = text(f"SELECT {columns} FROM jobs WHERE model = :m").bindparams(m=self.jobs.model)
        assert {tuple(row) for row in self.do(query)} == {
            (
                i,
                m.status,
                m.attempt,
                m.failures,
                m.losses,
                m.lost_alone,
                m.isolation,
                m.life,
                m.cancel_requested,
                m.purged,
                m.status == "succeeded" and not m.purged,
            )
            for i, m in self.models.items()
        }
        query = text(
            "SELECT a.job_id, array_agg(a.outcome ORDER BY a.attempt) AS o FROM attempts a "
            "JOIN jobs j ON j.id = a.job_id WHERE j.model = :m GROUP BY 1"
        ).bindparams(m=self.jobs.model)
        assert {row.job_id: row.o for row in self.do(query)} == {
            i: m.outcomes for i, m in self.models.items() if m.outcomes
        }

    @invariant()
    def what_is_queued_and_what_was_used_is_counted(self) -> None:
        queued = sum(m.status == "queued" for m in self.models.values())
        assert sum(row.jobs for row in self.do(lanes.depths(self.jobs.model))) == queued
        today = datetime.now(UTC).date()
        statement = usage.used(
            "anonymous", first=today - timedelta(days=1), last=today, model=self.jobs.model
        )
        used = self.do(statement)
        ends: Counter[str] = sum((m.ends for m in self.models.values()), Counter())
        assert {
            name: sum(row[i] for row in used) for i, name in enumerate(usage.AMOUNTS[:4], 4)
        } == {name: ends[name] for name in usage.AMOUNTS[:4]}
        over = sum(outcome != "running" for m in self.models.values() for outcome in m.outcomes)
        assert sum(row.attempts for row in used) == over


def test_whatever_is_done_in_whatever_order(jobs: Jobs) -> None:
    make: Callable[[], Machine] = lambda: Machine(jobs)  # noqa: E731
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
