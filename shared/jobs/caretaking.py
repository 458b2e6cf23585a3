"""Statements on the jobs table that only maintenance runs: late jobs, retention, messages that
Redis lost.

Each takes a batch and leaves the rest to the next round, so that no round holds locks for long and
vacuum keeps up.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Select,
    Update,
    case,
    delete,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.sql.dml import ReturningDelete

from shared.db.expressions import seconds
from shared.db.tables import Model, Worker
from shared.jobs.membership import of_none_that_is_open
from shared.jobs.repository import (
    COMPLETE_BY_ERROR,
    JOBS,
    MAX_RUN_ERROR,
    PURGED,
    RELEASED,
    START_BY_ERROR,
    SWEEP_BATCH,
    complete_by_passed,
    json_value,
    move,
    purge_after,
    start_by_passed,
)
from shared.jobs.status import JobStatus

_J = JOBS.c

REMOVE_CHUNK = 1_000  # rows that one transaction of the retention removes

REVISION_ERROR = {
    "code": "model_revision_changed",
    "message": "the replay is bound to a revision of its model that no worker serves any more",
    "param": "model",
    "retryable": False,
}


def sweep_deadlines(
    *, grace_seconds: float, running_too: bool = True, limit: int = SWEEP_BATCH
) -> Select[Any]:
    """queued -> expired for jobs that nobody began, or finished, in time; running -> expired should
    the worker not.

    Args:
        grace_seconds: what a worker gets beyond the deadline to end its job itself, with what it
            has measured.
        running_too: False while workers may hold ends that they could not record
            (`shared.jobs.lease_clock`).
    """
    queued, running = JobStatus.QUEUED.value, JobStatus.RUNNING.value
    overdue = _J.complete_by < func.now() - seconds(grace_seconds)
    ran_out = _J.started_at + func.make_interval(
        0, 0, 0, 0, 0, 0, _J.max_run_seconds
    ) < func.now() - seconds(grace_seconds)
    late = union_all(
        select(_J.id)
        .where(_J.status == queued, _J.start_by < func.now(), _J.started_at.is_(None))
        .limit(limit),
        select(_J.id).where(_J.status == queued, _J.complete_by < func.now()).limit(limit),
        select(_J.id)
        .where(literal(running_too), _J.status == running, or_(overdue, ran_out))
        .limit(limit),
    ).subquery()
    still = or_(
        (_J.status == queued) & or_(start_by_passed(), complete_by_passed()),
        literal(running_too)
        & (_J.status == running)
        & func.coalesce(or_(overdue, ran_out), literal(False)),
    )
    why = case(
        ((_J.status == queued) & ~complete_by_passed(), json_value(START_BY_ERROR)),
        (complete_by_passed(), json_value(COMPLETE_BY_ERROR)),
        else_=json_value(MAX_RUN_ERROR),
    )
    return move(
        update(JOBS)
        .where(_J.id.in_(select(late.c.id)), _J.status.in_((queued, running)), still)
        .values(
            status=JobStatus.EXPIRED.value,
            error=why,
            finished_at=func.now(),
            purge_after=purge_after(),
            **RELEASED,
        )
    )


def fail_unservable(*, silent_seconds: float, limit: int = SWEEP_BATCH) -> Select[Any]:
    """queued -> failed for replays, which are pinned to a revision of their model, when it is not
    served any more.

    It is not while another revision is the registered one and no worker that may still be there has
    the pinned one. A worker of an older program, which did not say what it has, may. (The answers
    of an evaluation are pinned too, and its caretaker's.)

    Args:
        silent_seconds: for how long a worker may be silent and still be there.
    """
    models, workers = Model.__table__.c, Worker.__table__.c
    may_have_it = (
        (workers.model == _J.model)
        & (workers.state != "stopped")
        & (workers.last_beat_at >= func.now() - seconds(silent_seconds))
        & or_(workers.revision.is_(None), workers.revision == _J.pinned_revision)
    )
    gone = (
        select(_J.id)
        .join(Model, models.name == _J.model)
        .where(
            _J.status == JobStatus.QUEUED.value,
            _J.pinned_revision.is_not(None),
            _J.batch_id.is_(None),
            _J.pinned_revision.is_distinct_from(models.card["revision"].astext),
            ~exists().where(may_have_it),
        )
        .limit(limit)
        .with_for_update(of=JOBS, skip_locked=True)
    )
    return move(
        update(JOBS)
        .where(_J.id.in_(gone), _J.status == JobStatus.QUEUED.value)
        .values(
            status=JobStatus.FAILED.value,
            error=json_value(REVISION_ERROR),
            finished_at=func.now(),
            purge_after=purge_after(),
            **RELEASED,
        )
    )


def purge_due(*, limit: int = REMOVE_CHUNK) -> Update:
    """The same for jobs whose `retain_for` is over, a batch at a time; a line's result waits for
    its batch's files.
    """
    due = (
        select(_J.id)
        .where(_J.purge_after < func.now(), _J.purged_at.is_(None), of_none_that_is_open())
        .order_by(_J.purge_after)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return update(JOBS).where(_J.id.in_(due)).values(**PURGED).returning(_J.id)


def delete_old(*, older_than_seconds: float, limit: int = REMOVE_CHUNK) -> ReturningDelete[Any]:
    """Forget even the ledger rows of jobs that ended long ago, a batch at a time; their attempts go
    with them.

    A job whose own `retain_for` is longer stays until that is over.

    Lines of a batch, and answers of an evaluation, that is not over yet stay: its files are made of
    them.
    """
    old = (
        select(_J.id)
        .where(
            _J.finished_at < func.now() - seconds(older_than_seconds),
            or_(_J.purge_after.is_(None), _J.purge_after < func.now()),
            of_none_that_is_open(),
        )
        .order_by(_J.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return delete(JOBS).where(_J.id.in_(old)).returning(_J.id)


def pushed_counts() -> Select[Any]:
    """(model, priority, count) of the jobs whose message should be in Redis: at most a window and
    what runs late.
    """
    return (
        select(_J.model, _J.priority, func.count().label("count"))
        .where(
            _J.status == JobStatus.QUEUED.value, _J.pushed_at.is_not(None), _J.isolation.is_(None)
        )
        .group_by(_J.model, _J.priority)
    )


def repush_candidates(
    model: str, priority: str, *, repush_after_seconds: float, limit: int
) -> Select[Any]:
    """(id, model, priority) of queued jobs that were pushed so long ago that their message may be
    lost.
    """
    return (
        select(_J.id, _J.model, _J.priority)
        .where(
            _J.status == JobStatus.QUEUED.value,
            _J.model == model,
            _J.priority == priority,
            _J.pushed_at < func.now() - seconds(repush_after_seconds),
            _J.isolation.is_(None),
        )
        .order_by(_J.pushed_at)
        .limit(limit)
    )


def forget_idempotency_keys(*, older_than_seconds: float, limit: int = REMOVE_CHUNK) -> Update:
    """Free the idempotency keys of old jobs, so that they may be used anew."""
    old = (
        select(_J.id)
        .where(
            _J.idempotency_key.is_not(None),
            _J.created_at < func.now() - seconds(older_than_seconds),
        )
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return update(JOBS).where(_J.id.in_(old)).values(idempotency_key=null()).returning(_J.id)
