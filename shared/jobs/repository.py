"""All moves of a job, as statements that a sync and an async session both execute.

Each function returns one statement; a move and its row in `attempts` are one statement too
(data-modifying CTEs), so they cannot come apart. Every move is `UPDATE ... WHERE status IN
(allowed) ... RETURNING`: of two callers one gets the row back, the other nothing. `attempt` is the
fence: a worker that lost its lease matches no row any more.

    claim            queued -> running                      worker
    heartbeat        renews leases, carries progress        worker
    finish           running -> any end                     worker, fenced
    fail_attempt     running -> queued or failed            worker, fenced, counts a failure
    drain            running -> queued, no failure          worker that shuts down, fenced
    sweep_expired    running -> queued or an end            sweeper, leases that ran out, counts a
                                                            loss
    lose_attempt     running -> queued or an end            worker whose engine stopped, fenced,
                                                            counts a loss
    request_cancel   queued -> cancelled, running: a flag   API
    retry            failed|cancelled|expired -> queued     API, another life of the job
    purge            input and output go, the row stays     API

What the sweeper alone asks (deadlines, retention, lost messages) is in `shared.jobs.caretaking`.

Times are the database's (`now()`), so clocks of machines need not agree. Who may move what:
`shared.jobs.status`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    Update,
    case,
    extract,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
    values,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

from shared.db.expressions import seconds
from shared.db.tables import Attempt, Job
from shared.jobs.formats import ROW_FORMAT, SUSPECT_FORMAT, UNDERSTOOD_FORMAT
from shared.jobs.status import RETRIABLE, AttemptOutcome, JobStatus, sources

JOBS = cast(Table, Job.__table__)
ATTEMPTS = cast(Table, Attempt.__table__)
_J = JOBS.c
_A = ATTEMPTS.c

SUSPECT_SPLIT = 4  # a group that was lost runs again in groups of this part of its size
SWEEP_BATCH = 500  # rows that one sweep moves; the next round takes the rest

CANCELLED_ERROR = {
    "code": "cancelled",
    "message": "the job was cancelled",
    "param": None,
    "retryable": False,
}
WORKER_LOST_ERROR = {
    "code": "worker_lost",
    "message": "the worker process stopped answering while it ran this attempt",
    "param": None,
    "retryable": True,
}
QUARANTINED_ERROR = {
    "code": "job_quarantined",
    "message": "the worker process died each time it ran this job alone, max_attempts times; retry the job to try again",
    "param": None,
    "retryable": False,
}
RESULT_NOT_STORED_ERROR = {
    "code": "result_not_stored",
    "message": "the job ran, but its result cannot be stored",
    "param": None,
    "retryable": False,
}
RESULT_BYTES_MAX = 64 * 1024 * 1024  # of a result as JSON text

START_BY_ERROR = {
    "code": "start_by_passed",
    "message": "no worker began the job before deadlines.start_by",
    "param": "deadlines.start_by",
    "retryable": True,
}
COMPLETE_BY_ERROR = {
    "code": "complete_by_passed",
    "message": "the job was not done before deadlines.complete_by",
    "param": "deadlines.complete_by",
    "retryable": True,
}
MAX_RUN_ERROR = {
    "code": "max_run_seconds_exceeded",
    "message": "the job ran longer than deadlines.max_run_seconds",
    "param": "deadlines.max_run_seconds",
    "retryable": False,
}

# A job that ended or went back has no holder; CHECK lease_while_running insists.
RELEASED: dict[str, Any] = {"lease_until": None, "worker_id": None}

MOVED = (
    _J.id,
    _J.attempt,
    _J.model,
    _J.priority,
    _J.status,
    _J.isolation,
)  # what every move returns
# What a worker needs to run the job that it claimed.
CLAIMED = (
    _J.id,
    _J.attempt,
    _J.life,
    _J.max_run_seconds,
    # Seconds, not a moment: the worker's clock may be wrong.
    extract("epoch", _J.complete_by - func.now()).label("seconds_left"),
    _J.failures,
    _J.losses,
    _J.isolation,
    _J.max_attempts,
    _J.tenant,
    _J.endpoint,
    _J.model,
    _J.priority,
    _J.worker_id,
    _J.params,
    _J.prompt_token_ids,
    _J.created_at,
    _J.queued_at,
    _J.started_at,
    _J.traceparent,
)

Pair = tuple[str, int]  # (job id, attempt): what a worker holds


def json_value(value: Mapping[str, Any]) -> ColumnElement[Any]:
    return literal(dict(value), JSONB)


def move(moved: Update, **attempt: ColumnElement[Any]) -> Select[Any]:
    """Run `moved`, close the attempts of its rows, and SELECT what `MOVED` names, as it is now."""
    rows = moved.returning(*MOVED, _J.error).cte("moved")
    outcome = attempt.get("outcome", rows.c.status)
    closed = (
        update(ATTEMPTS)
        .where(
            _A.job_id == rows.c.id,
            _A.attempt == rows.c.attempt,
            _A.outcome == AttemptOutcome.RUNNING.value,
        )
        .values(outcome=outcome, ended_at=func.now(), error=attempt.get("error", rows.c.error))
        .cte("closed")
    )
    return select(*(rows.c[column.name] for column in MOVED)).add_cte(closed)


def _held(pairs: Sequence[Pair]) -> ColumnElement[bool]:
    return tuple_(_J.id, _J.attempt).in_(list(pairs))


def _one_held(job_id: str, attempt: int, target: JobStatus) -> tuple[ColumnElement[bool], ...]:
    # `sources` lists queued too for some targets; only a running attempt can be finished by its
    # holder.
    assert JobStatus.RUNNING.value in sources(target)
    return (_J.id == job_id, _J.status == JobStatus.RUNNING.value, _J.attempt == attempt)


def get_job(job_id: str) -> Select[Any]:
    """The whole row."""
    return select(JOBS).where(_J.id == job_id)


def job_attempts(job_id: str) -> Select[Any]:
    """The attempts of a job, oldest first."""
    return select(ATTEMPTS).where(_A.job_id == job_id).order_by(_A.attempt)


def start_by_passed() -> ColumnElement[bool]:
    # A job that began in time and came back to the queue kept its promise.
    return func.coalesce(_J.start_by < func.now(), literal(False)) & _J.started_at.is_(None)


def complete_by_passed() -> ColumnElement[bool]:
    return func.coalesce(_J.complete_by < func.now(), literal(False))


def purge_after() -> ColumnElement[Any]:
    """Return the time at which a job that ends now is purged; NULL without `retain_for`."""
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, _J.retain_seconds)


def claimable(
    revision: str | None, understands: int = UNDERSTOOD_FORMAT
) -> tuple[ColumnElement[bool], ...]:
    """The job waits, in time, for a worker with this revision of its model."""
    return (
        _J.status.in_(sources(JobStatus.RUNNING)),
        ~_J.cancel_requested,
        ~start_by_passed(),
        ~complete_by_passed(),
        or_(_J.pinned_revision.is_(None), _J.pinned_revision == revision),
        _J.format <= understands,
    )


def claim(
    job_id: str,
    *,
    worker_id: str,
    lease_seconds: float,
    revision: str | None = None,
    model: str | None = None,
    understands: int = UNDERSTOOD_FORMAT,
    apart: bool = False,
    alone: bool = False,
) -> Select[Any]:
    """queued -> running. Returns `CLAIMED`.

    Return nothing for a duplicate message, a job that is cancelled or too late, a job of another
    model (a message in the wrong queue), a replay of another revision of the model, or a row that a
    newer program wrote.

    Args:
        model: the one that the worker serves; None claims a job of any model.
        apart: claim a suspect. The worker promises to run it with no jobs but suspects; other
            claims leave suspects alone.
        alone: the worker runs nothing else at all.
    """
    claimed = (
        update(JOBS)
        .where(
            _J.id == job_id,
            *claimable(revision, understands),
            _J.isolation.is_not(None) if apart else _J.isolation.is_(None),
            true() if model is None else _J.model == model,
        )
        .values(
            status=JobStatus.RUNNING.value,
            attempt=_J.attempt + 1,
            worker_id=worker_id,
            lease_until=func.now() + seconds(lease_seconds),
            started_at=func.now(),
            progress=null(),
            revision=revision,
        )
        .returning(*CLAIMED)
        .cte("claimed")
    )
    opened = (
        insert(ATTEMPTS)
        .from_select(
            ["job_id", "attempt", "life", "worker_id", "started_at", "alone"],
            select(
                claimed.c.id,
                claimed.c.attempt,
                claimed.c.life,
                claimed.c.worker_id,
                claimed.c.started_at,
                literal(alone),
            ),
            include_defaults=False,
        )
        .cte("opened")
    )
    return select(claimed).add_cte(opened)


def cancels_of(pairs: Iterable[Pair]) -> Select[Any]:
    """Select (id, attempt) of these running attempts whose rows ask for a cancel."""
    return select(_J.id, _J.attempt).where(
        tuple_(_J.id, _J.attempt).in_(list(pairs)),
        _J.status == JobStatus.RUNNING.value,
        _J.cancel_requested,
    )


def heartbeat(held: Mapping[Pair, Mapping[str, Any] | None], *, lease_seconds: float) -> Update:
    """Renew the leases of all held attempts at once and store their progress.

    Returns (id, attempt, cancel_requested) of the rows still held. A pair that does not come back
    is lost.
    """
    beats = values(_J.id, _J.attempt, _J.progress, name="beats").data(
        [(job_id, attempt, progress) for (job_id, attempt), progress in held.items()]
    )
    return (
        update(JOBS)
        .where(
            _J.id == beats.c.id, _J.attempt == beats.c.attempt, _J.status == JobStatus.RUNNING.value
        )
        .values(
            lease_until=func.now() + seconds(lease_seconds),
            # None arrives as JSON's null, so that the column has a type when all are None.
            progress=func.coalesce(
                func.nullif(beats.c.progress, literal_column("'null'::jsonb")), _J.progress
            ),
        )
        .returning(_J.id, _J.attempt, _J.cancel_requested)
    )


def finish(
    job_id: str,
    attempt: int,
    status: JobStatus,
    *,
    result: Mapping[str, Any] | None = None,
    error: Mapping[str, Any] | None = None,
    usage: Mapping[str, Any] | None = None,
    timing: Mapping[str, Any] | None = None,
    diffusion: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
    steps: bytes | None = None,
) -> Select[Any]:
    """running -> an end, by the holder of the attempt; nothing for a stale one. A success after
    complete_by is expired.
    """
    columns = {
        "result": result,
        "error": error,
        "usage": usage,
        "timing": timing,
        "diffusion": diffusion,
    }
    values: dict[str, Any] = {
        name: null() if value is None else json_value(value) for name, value in columns.items()
    }
    if result is not None:
        values["result"] = literal(dict(result), JSON)
    values["status"] = status.value
    if status is JobStatus.SUCCEEDED:
        late = complete_by_passed()
        values["status"] = case((late, JobStatus.EXPIRED.value), else_=status.value)
        values["result"] = case((late, null()), else_=values["result"])
        values["error"] = case((late, json_value(COMPLETE_BY_ERROR)), else_=null())
    return move(
        update(JOBS)
        .where(*_one_held(job_id, attempt, status))
        .values(
            finished_at=func.now(),
            purge_after=purge_after(),
            **RELEASED,
            **values,
            **({} if progress is None else {"progress": json_value(progress)}),
            steps=steps,
        )
    )


def fail_attempt(job_id: str, attempt: int, *, error: Mapping[str, Any]) -> Select[Any]:
    """A retryable failure: back to queued, or failed when that was the last; cancelled if somebody
    asked for it.
    """
    return move(
        _give_back(
            update(JOBS).where(*_one_held(job_id, attempt, JobStatus.QUEUED)),
            exhausted=_J.failures + 1 >= _J.max_attempts,
            failures=_J.failures + 1,
            error=json_value(error),
        ),
        outcome=literal(AttemptOutcome.FAILED.value),
        error=json_value(error),
    )


def drain(pairs: Sequence[Pair]) -> Select[Any]:
    """running -> queued for a worker that shuts down; no failure is counted. Push the returned ones
    after COMMIT.
    """
    return move(
        _give_back(update(JOBS).where(_J.status == JobStatus.RUNNING.value, _held(pairs))),
        outcome=literal(AttemptOutcome.DRAINED.value),
        error=null(),
    )


def sweep_expired(*, limit: int = SWEEP_BATCH) -> Select[Any]:
    """running -> queued for jobs whose lease ran out; failed when quarantined; cancelled if that
    was asked for.

    The caller has made sure that leases could be renewed (`shared.jobs.lease_clock`).
    """
    running = _J.status == JobStatus.RUNNING.value
    expired = (
        select(_J.id)
        .where(running, _J.lease_until < func.now())
        .order_by(_J.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("expired_leases")
    )
    group = (
        select(_J.worker_id, func.count().label("size"))
        .where(running)
        .group_by(_J.worker_id)
        .cte("groups")
    )
    statement = update(JOBS).where(
        _J.id == expired.c.id, running, group.c.worker_id == _J.worker_id
    )
    return move(
        _lose(statement, group_size=group.c.size),
        outcome=literal(AttemptOutcome.LOST.value),
        error=json_value(WORKER_LOST_ERROR),
    )


def lose_attempt(
    job_id: str, attempt: int, *, group_size: int, error: Mapping[str, Any]
) -> Select[Any]:
    """running -> queued by its holder, whose engine stopped under it and `group_size` - 1 others;
    as `sweep_expired`.
    """
    return move(
        _lose(
            update(JOBS).where(*_one_held(job_id, attempt, JobStatus.QUEUED)),
            group_size=literal(group_size),
        ),
        outcome=literal(AttemptOutcome.LOST.value),
        error=json_value(error),
    )


def _lose(statement: Update, *, group_size: ColumnElement[int]) -> Update:
    """Give back what a worker took down with it. The jobs become suspects, to be run apart in
    smaller and smaller groups.

    A worker's death proves nothing about one of several jobs, and it is no failure of the job. Only
    a loss while the job ran alone counts towards its quarantine.
    """
    alone = func.coalesce(
        select(_A.alone)
        .where(_A.job_id == _J.id, _A.attempt == _J.attempt)
        .correlate(JOBS)
        .scalar_subquery(),
        False,
    )
    lost_alone = _J.lost_alone + case((alone, 1), else_=0)
    return _give_back(
        statement,
        exhausted=alone & (lost_alone >= _J.max_attempts),
        error=json_value(QUARANTINED_ERROR),
    ).values(
        losses=_J.losses + 1,
        lost_alone=lost_alone,
        isolation=func.greatest(1, func.coalesce(_J.isolation, group_size) / SUSPECT_SPLIT),
        format=func.greatest(_J.format, SUSPECT_FORMAT),
    )


def _give_back(
    statement: Update,
    *,
    exhausted: ColumnElement[bool] | None = None,
    failures: ColumnElement[int] | None = None,
    error: ColumnElement[Any] | None = None,
) -> Update:
    """Write running -> queued, or the end that replaces it: cancelled (asked for), expired (late),
    failed (no attempts left).
    """
    ends: list[tuple[ColumnElement[bool], JobStatus, ColumnElement[Any]]] = [
        (_J.cancel_requested, JobStatus.CANCELLED, json_value(CANCELLED_ERROR)),
        (complete_by_passed(), JobStatus.EXPIRED, json_value(COMPLETE_BY_ERROR)),
    ]
    if exhausted is not None and error is not None:
        ends.append((exhausted, JobStatus.FAILED, error))
    over = or_(*(when for when, _, _ in ends))
    return statement.values(
        status=case(
            *((when, status.value) for when, status, _ in ends), else_=JobStatus.QUEUED.value
        ),
        error=case(*((when, why) for when, _, why in ends), else_=null()),
        finished_at=case((over, func.now()), else_=null()),
        purge_after=case((over, purge_after()), else_=null()),
        queued_at=case((over, _J.queued_at), else_=func.now()),
        pushed_at=null(),
        progress=null(),
        failures=_J.failures if failures is None else failures,
        **RELEASED,
    )


def request_cancel(job_id: str) -> Update:
    """queued -> cancelled at once; running: a flag that its worker sees. Nothing for finished or
    unknown jobs.

    Returns (id, status). Status `running` means: publish on `shared.events.CANCEL_CHANNEL` too, it
    is faster.
    """
    return cancel_where(_J.id == job_id)


def cancel_where(*which: ColumnElement[bool]) -> Update:
    """`request_cancel` of many."""
    queued = _J.status == JobStatus.QUEUED.value
    return (
        update(JOBS)
        .where(*which, _J.status.in_(sources(JobStatus.CANCELLED)))
        .values(
            status=case((queued, JobStatus.CANCELLED.value), else_=_J.status),
            finished_at=case((queued, func.now()), else_=_J.finished_at),
            purge_after=case((queued, purge_after()), else_=_J.purge_after),
            error=case((queued, json_value(CANCELLED_ERROR)), else_=_J.error),
            cancel_requested=True,
        )
        .returning(_J.id, _J.status)
    )


def expire_where(*which: ColumnElement[bool]) -> Update:
    """queued -> expired for those whose `complete_by` has passed."""
    return (
        update(JOBS)
        .where(*which, _J.status == JobStatus.QUEUED.value, complete_by_passed())
        .values(
            status=JobStatus.EXPIRED.value,
            error=json_value(COMPLETE_BY_ERROR),
            finished_at=func.now(),
            purge_after=purge_after(),
        )
        .returning(_J.id)
    )


def retry(
    job_id: str, tenant: str, *, key_id: str, deadlines: Mapping[str, Any] | None = None
) -> Update:
    """failed, cancelled or expired -> queued: a new life, with its attempts before it. Returns (id,
    model, priority).

    Args:
        key_id: who asks, and pays for this life.
        deadlines: columns that replace the former ones; without them, moments that have passed are
            dropped.
    """
    return retry_where(_J.id == job_id, _J.tenant == tenant, deadlines=deadlines).values(
        key_id=key_id
    )


def is_retriable() -> ColumnElement[bool]:
    """The job is over without an answer, and what it was asked is still there."""
    return _J.status.in_([s.value for s in RETRIABLE]) & _J.purged_at.is_(None)


def retry_where(*which: ColumnElement[bool], deadlines: Mapping[str, Any] | None = None) -> Update:
    """`retry` of many."""
    if deadlines is None:
        deadlines = {
            name: case((_J[name] > func.now(), _J[name]), else_=null())
            for name in ("start_by", "complete_by")
        }
    quarantined = func.coalesce(_J.error["code"].astext == QUARANTINED_ERROR["code"], False)
    return (
        update(JOBS)
        .where(*which, is_retriable())
        .values(
            status=JobStatus.QUEUED.value,
            life=_J.life + 1,
            failures=0,
            losses=0,
            lost_alone=0,
            # Quarantine ends a life; the next one begins as careful as that one ended.
            isolation=case((quarantined, 1), else_=null()),
            format=case(
                (quarantined, _J.format), (_J.format == SUSPECT_FORMAT, ROW_FORMAT), else_=_J.format
            ),
            cancel_requested=False,
            queued_at=func.now(),
            **dict.fromkeys(
                (
                    "finished_at",
                    "started_at",
                    "purge_after",
                    "pushed_at",
                    "progress",
                    "result",
                    "steps",
                    "error",
                    "usage",
                    "timing",
                    "diffusion",
                ),
                null(),
            ),
            **deadlines,
        )
        .returning(_J.id, _J.model, _J.priority)
    )


PURGED: dict[str, Any] = {
    "body": literal({}, JSON),
    "params": literal({}, JSON),
    "prompt_token_ids": literal_column("'{}'::integer[]"),
    "result": null(),
    "steps": null(),
    "progress": null(),
    "request_hash": null(),
    "purged_at": func.now(),
}


def purge(job_id: str, tenant: str) -> Update:
    """Forget what went in and came out of a job that is over; returns its id."""
    return (
        update(JOBS)
        .where(
            _J.id == job_id,
            _J.tenant == tenant,
            _J.finished_at.is_not(None),
            _J.purged_at.is_(None),
        )
        .values(**PURGED)
        .returning(_J.id)
    )


def mark_pushed(job_ids: Sequence[str]) -> Update:
    """Note that the messages of these jobs went to Redis just now."""
    return (
        update(JOBS)
        .where(_J.id.in_(list(job_ids)), _J.status == JobStatus.QUEUED.value)
        .values(pushed_at=func.now())
    )
