"""Suspects: jobs that were lost with their worker and now run apart from all others. Statements.

A worker that dies takes every job of its batch with it, and nobody knows which of them killed it,
if one did. `repository.sweep_expired` therefore makes all of them suspects. `jobs.isolation` says
how many suspects may run together:
a quarter of the lost group, in the end one. A suspect has no message in Redis; a worker that has
nothing else to do, or sets everything else aside for it (`worker.isolation`), claims it from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, Update, case, extract, func, literal, select, true, tuple_, update

from shared.jobs.repository import ATTEMPTS, CLAIMED, JOBS, QUARANTINED_ERROR, Pair, claimable
from shared.jobs.status import AttemptOutcome, JobStatus, Priority

_J, _A = JOBS.c, ATTEMPTS.c
_RANK = case(
    *((_J.priority == priority.value, priority.rank) for priority in Priority), else_=len(Priority)
)
QUARANTINED_SECONDS = 24 * 3600
COUNTED_MAX = 1_000  # suspects that a place in the queue is counted with


def waiting(model: str, *, revision: str | None, limit: int) -> Select[Any]:
    """(id, isolation, losses, waited): suspects that a worker of the model may claim, the first
    first.
    """
    waited = extract("epoch", func.now() - _J.queued_at).label("waited")
    return (
        select(_J.id, _J.isolation, _J.losses, waited)
        .where(*claimable(revision), _J.isolation.is_not(None), _J.model == model)
        .order_by(_RANK, _J.queued_at, _J.id)
        .limit(limit)
    )


def per_lane(model: str | None = None) -> Select[Any]:
    """(model, priority, tenant, key_id, jobs) of the suspects that wait, counted to `COUNTED_MAX`
    in all.
    """
    some = (
        select(_J.model, _J.priority, _J.tenant, _J.key_id)
        .where(
            _J.status == JobStatus.QUEUED.value,
            _J.isolation.is_not(None),
            true() if model is None else _J.model == model,
        )
        .limit(COUNTED_MAX)
        .subquery("some")
    )
    return select(*some.c, func.count().label("jobs")).group_by(*some.c)


def ahead(row: Mapping[Any, Any]) -> Select[Any]:
    """Count the suspects that are claimed before this one, to `COUNTED_MAX`."""
    mine = (literal(Priority(row["priority"]).rank), row["queued_at"], row["id"])
    before = (
        select(_J.id)
        .where(
            _J.status == JobStatus.QUEUED.value,
            _J.isolation.is_not(None),
            _J.model == row["model"],
            tuple_(_RANK, _J.queued_at, _J.id) < tuple_(*mine),
        )
        .limit(COUNTED_MAX)
    )
    return select(func.count()).select_from(before.subquery("before"))


def let_others_in(pair: Pair) -> Update:
    """The attempt does not run alone any more: should its worker die now, that is not held against
    the job.
    """
    job_id, attempt = pair
    return (
        update(ATTEMPTS)
        .where(
            _A.job_id == job_id, _A.attempt == attempt, _A.outcome == AttemptOutcome.RUNNING.value
        )
        .values(alone=False)
    )


def claimed_by(job_id: str, worker_id: str) -> Select[Any]:
    """The job as `claim` returns it, if the worker holds it: after a claim whose COMMIT was not
    answered.
    """
    return select(*CLAIMED).where(
        _J.id == job_id, _J.worker_id == worker_id, _J.status == JobStatus.RUNNING.value
    )


def ended_attempt(job_id: str, attempt: int) -> Select[Any]:
    """(id, attempt, model, priority, status, isolation) of a job whose holder ended this attempt;
    nothing otherwise.

    For a holder whose COMMIT was not answered. `status` is where its move led.
    """
    ended = (
        AttemptOutcome.SUCCEEDED,
        AttemptOutcome.FAILED,
        AttemptOutcome.CANCELLED,
        AttemptOutcome.EXPIRED,
    )
    return (
        select(_J.id, _A.attempt, _J.model, _J.priority, _J.status, _J.isolation)
        .join_from(ATTEMPTS, JOBS, _J.id == _A.job_id)
        .where(
            _A.job_id == job_id,
            _A.attempt == attempt,
            _A.outcome.in_([outcome.value for outcome in ended]),
            _J.attempt == literal(attempt),
        )
    )


def counts() -> Select[Any]:
    """(model, waiting, oldest_seconds) of the suspects that wait."""
    return (
        select(
            _J.model,
            func.count().label("waiting"),
            extract("epoch", func.now() - func.min(_J.queued_at)).label("oldest_seconds"),
        )
        .where(_J.status == JobStatus.QUEUED.value, _J.isolation.is_not(None))
        .group_by(_J.model)
        .order_by(_J.model)
    )


def quarantined(*, limit: int) -> Select[Any]:
    """(id, model) of the jobs that were quarantined in the last day, the latest first."""
    day = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, float(QUARANTINED_SECONDS))
    return (
        select(_J.id, _J.model)
        .where(
            _J.finished_at > day,
            _J.status == JobStatus.FAILED.value,
            _J.error["code"].astext == QUARANTINED_ERROR["code"],
        )
        .order_by(_J.finished_at.desc())
        .limit(limit)
    )
