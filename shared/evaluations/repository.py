"""All SQL about evaluations. Whatever the caretaker writes goes with `hold`: one that lost its
lease changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    Delete,
    Executable,
    Insert,
    Integer,
    Select,
    Table,
    Update,
    and_,
    case,
    column,
    delete,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy import cast as cast_to
from sqlalchemy.dialects.postgresql import JSONPATH, insert

from shared.db.expressions import seconds, turn_of
from shared.db.tables import Evaluation, EvaluationItem, EvaluationRun, EvaluationSample
from shared.evaluations.status import OPEN, EvaluationStatus, RunStatus
from shared.jobs import repository as jobs
from shared.jobs.repository import JOBS
from shared.jobs.status import TERMINAL, JobStatus

EVALUATIONS = cast(Table, Evaluation.__table__)
ITEMS = cast(Table, EvaluationItem.__table__)
RUNS = cast(Table, EvaluationRun.__table__)
SAMPLES = cast(Table, EvaluationSample.__table__)
_E, _I, _R, _S, _J = EVALUATIONS.c, ITEMS.c, RUNS.c, SAMPLES.c, JOBS.c
_OPEN = [s.value for s in OPEN]
_OPEN_JOBS = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)
CANCEL_CHUNK = 2_000
REMOVE_CHUNK = 2_000  # rows that one transaction removes
HIDDEN_SECONDS = 600.0  # in which the next items of a new evaluation are stored


# What requests do


def create_hidden(values: Mapping[str, Any]) -> Executable:
    """Store an evaluation that nobody sees, so that its items can be stored in many transactions
    before `show`.

    It is stored as one that will be deleted: if its creator dies, housekeeping removes it once
    `HIDDEN_SECONDS` are over.
    """
    hidden = {
        "status": EvaluationStatus.CANCELLED.value,
        "content_hash": values["id"],
        "finished_at": func.now(),
        "deleted_at": func.now() + seconds(HIDDEN_SECONDS),
    }
    return insert(EVALUATIONS).values(**values, **hidden)


def keep_hidden(evaluation_id: str) -> Update:
    """Put the removal of a hidden evaluation off; returns nothing if it is too late."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.deleted_at > func.now())
        .values(deleted_at=func.now() + seconds(HIDDEN_SECONDS))
        .returning(_E.id)
    )


def show(evaluation_id: str, content_hash: str) -> Update:
    """Make a hidden evaluation visible; returns its row, or nothing if it is too late.

    A second evaluation of the same content violates `uq_evaluations_content`.
    """
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.deleted_at > func.now())
        .values(
            status=EvaluationStatus.IN_PROGRESS.value,
            content_hash=content_hash,
            finished_at=null(),
            deleted_at=null(),
        )
        .returning(*_E)
    )


def discard_hidden(evaluation_id: str) -> Update:
    """Have housekeeping remove a hidden evaluation now."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.deleted_at > func.now())
        .values(deleted_at=func.now())
    )


def by_content(tenant: str, content_hash: str) -> Select[Any]:
    """Find and lock the tenant's evaluation of the same content. A deleted one has another hash."""
    return (
        select(EVALUATIONS)
        .where(_E.tenant == tenant, _E.content_hash == content_hash)
        .with_for_update()
    )


def insert_items(rows: Sequence[Mapping[str, Any]]) -> Insert:
    return insert(ITEMS).values(list(rows))


def insert_run(values: Mapping[str, Any], window_seconds: float) -> Insert:
    return insert(RUNS).values(**values, expires_at=func.now() + seconds(window_seconds))


def get(evaluation_id: str, tenant: str) -> Select[Any]:
    return select(EVALUATIONS).where(
        _E.id == evaluation_id, _E.tenant == tenant, _E.deleted_at.is_(None)
    )


def lock(evaluation_id: str) -> Select[Any]:
    """Lock the row against another change of its runs. Returns nothing if the evaluation is
    deleted.
    """
    return (
        select(EVALUATIONS).where(_E.id == evaluation_id, _E.deleted_at.is_(None)).with_for_update()
    )


def list_evaluations(tenant: str, *, after: str | None, limit: int) -> Select[Any]:
    """Newest first, one row more than asked; without templates and graders, which may be large."""
    query = select(
        _E.id,
        _E.name,
        _E.status,
        _E.created_at,
        _E.finished_at,
        _E.dataset,
        _E["items"],
        _E.metadata,
    ).where(_E.tenant == tenant, _E.deleted_at.is_(None))
    if after is not None:
        query = query.where(_E.id < after)
    return query.order_by(_E.id.desc()).limit(limit + 1)


def runs(evaluation_id: str) -> Select[Any]:
    return select(RUNS).where(_R.evaluation_id == evaluation_id).order_by(_R.position)


def run_names(evaluation_ids: Sequence[str]) -> Select[Any]:
    """(evaluation_id, name, status, total, graded) of several evaluations' runs."""
    graded = select(func.count()).where(_S.run_id == _R.id).scalar_subquery()
    return (
        select(_R.evaluation_id, _R.name, _R.status, _R.total, graded.label("graded"))
        .where(_R.evaluation_id.in_(list(evaluation_ids)))
        .order_by(_R.evaluation_id, _R.position)
    )


def reopen(evaluation_id: str) -> Update:
    """There is something to do again; whoever held it begins anew."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id)
        .values(
            status=EvaluationStatus.IN_PROGRESS.value,
            cancelling_at=null(),
            finished_at=null(),
            holder=null(),
            lease_until=null(),
        )
    )


def continue_run(
    run_id: str, *, key_id: str, seeds: Sequence[int], total: int, window_seconds: float
) -> Update:
    return (
        update(RUNS)
        .where(_R.id == run_id)
        .values(
            status=RunStatus.IN_PROGRESS.value,
            error=null(),
            finished_at=null(),
            key_id=key_id,
            seeds=list(seeds),
            total=total,
            expires_at=func.now() + seconds(window_seconds),
        )
        .returning(_R.expires_at)
    )


def forget_errors(run_id: str) -> Executable:
    """Samples that are no answers, though a job was made for them; returns their numbers."""
    return (
        delete(SAMPLES)
        .where(_S.run_id == run_id, _S.outcome == "error", _S.job_id.is_not(None))
        .returning(_S.number)
    )


def retry_jobs(run_id: str, expires_at: Any, *, key_id: str) -> Update:
    """Another life for every job that has no answer; returns their ids."""
    deadlines = {"start_by": null(), "complete_by": expires_at}
    return jobs.retry_where(_J.batch_id == run_id, deadlines=deadlines).values(key_id=key_id)


def request_cancel(evaluation_id: str) -> Update:
    """in_progress -> cancelling; what is over stays over."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.status == EvaluationStatus.IN_PROGRESS.value)
        .values(
            status=EvaluationStatus.CANCELLING.value,
            cancelling_at=func.now(),
            holder=null(),
            lease_until=null(),
        )
        .returning(_E.id)
    )


def remove(evaluation_id: str) -> Update:
    """Mark it as deleted, unless it runs: nobody sees it, and the same may be created again.
    Returns its id.
    """
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.status.not_in(_OPEN), _E.deleted_at.is_(None))
        .values(deleted_at=func.now(), content_hash=_E.id)
        .returning(_E.id)
    )


def remove_deleted(limit: int = REMOVE_CHUNK) -> list[Delete]:
    """Statements that each remove a chunk of deleted evaluations: samples, then items, then runs
    and the evaluations.
    """
    first = select(_E.id).where(_E.deleted_at <= func.now()).order_by(_E.deleted_at)
    some = first.limit(10).scalar_subquery()
    of_runs = select(_R.id).where(_R.evaluation_id.in_(some))
    samples = select(_S.run_id, _S.number).where(_S.run_id.in_(of_runs)).limit(limit)
    items = select(_I.evaluation_id, _I.number).where(_I.evaluation_id.in_(some)).limit(limit)
    has_samples = exists().where(_R.evaluation_id == _E.id, _S.run_id == _R.id)
    empty = first.where(~has_samples, ~exists().where(_I.evaluation_id == _E.id)).limit(limit)
    return [
        delete(SAMPLES).where(tuple_(_S.run_id, _S.number).in_(samples)),
        delete(ITEMS).where(tuple_(_I.evaluation_id, _I.number).in_(items)),
        delete(EVALUATIONS).where(_E.id.in_(empty)),
    ]


# What is read


def progress(evaluation_id: str) -> Select[Any]:
    """(run_id, outcome, count) of the samples."""
    return (
        select(_S.run_id, _S.outcome, func.count().label("count"))
        .join_from(SAMPLES, RUNS, _S.run_id == _R.id)
        .where(_R.evaluation_id == evaluation_id)
        .group_by(_S.run_id, _S.outcome)
    )


def open_jobs(evaluation_id: str) -> Select[Any]:
    """(run_id, status, count) of the jobs that are queued or running."""
    return (
        select(_J.batch_id.label("run_id"), _J.status, func.count().label("count"))
        .where(
            _J.batch_id.in_(
                select(_R.id).where(_R.evaluation_id == evaluation_id).scalar_subquery()
            ),
            _J.status.in_(_OPEN_JOBS),
        )
        .group_by(_J.batch_id, _J.status)
    )


def numbers(run_id: str) -> Select[Any]:
    """Select the columns of every sample that statistics use, ordered by item and repeat, with the
    item's key and cluster.
    """
    return (
        select(
            _S.item,
            _S.repeat,
            _S.outcome,
            _I.key,
            _I.cluster,
            _S.completion_tokens,
            _S.forwards,
            _S.latency_ms,
            _S.queued_ms,
            _S.device_ms,
            _S.started_at,
            _S.finished_at,
        )
        .join_from(SAMPLES, RUNS, _S.run_id == _R.id)
        .join(ITEMS, and_(_I.evaluation_id == _R.evaluation_id, _I.number == _S.item))
        .where(_S.run_id == run_id)
        .order_by(_S.item, _S.repeat)
    )


def top_errors(run_id: str, limit: int = 5) -> Select[Any]:
    """(code, count, message): of jobs, and of graders that could not tell; the most frequent first."""
    error = func.coalesce(
        _S.error, func.jsonb_path_query_first(_S.verdicts, cast_to("$[*].error", JSONPATH))
    )
    code = error.op("->>")("code")
    return (
        select(
            code.label("code"),
            func.count().label("count"),
            func.min(error.op("->>")("message")).label("message"),
        )
        .where(_S.run_id == run_id, _S.outcome == "error")
        .group_by(code)
        .order_by(func.count().desc(), code)
        .limit(limit)
    )


LISTED_SAMPLE = [
    _R.evaluation_id,
    _R.name,
    _R.position,
    _S.item,
    _S.repeat,
    _R.seeds,
    _S.job_id,
    _S.outcome,
    _S.error,
    _S.completion_tokens,
    _S.forwards,
    _S.latency_ms,
    _I.line,
]
WHOLE_SAMPLE = [*LISTED_SAMPLE, _S.output, _S.verdicts, _I.data]
Place = tuple[str, int, int, int]  # outcome, item, run's position, repeat


def samples(
    evaluation_id: str,
    *,
    configuration: str | None,
    outcome: str | None,
    after: Place | None,
    limit: int,
    whole: bool = False,
) -> Select[Any]:
    """Errors, then failures, then what passed; an item's answers beside each other. One row more
    than asked.

    Args:
        whole: with the item's data, the answer and what the graders said, which have no bound.
    """
    query = (
        select(*(WHOLE_SAMPLE if whole else LISTED_SAMPLE))
        .join_from(RUNS, SAMPLES, _S.run_id == _R.id)
        .join(ITEMS, and_(_I.evaluation_id == _R.evaluation_id, _I.number == _S.item))
        .where(_R.evaluation_id == evaluation_id)
    )
    place = (_S.outcome, _S.item, _R.position, _S.repeat)
    if configuration is not None:
        query = query.where(_R.name == configuration)
    if outcome is not None:
        query = query.where(_S.outcome == outcome)
    if after is not None:
        query = query.where(tuple_(*place) > tuple_(*after))
    return query.order_by(*place).limit(limit + 1)


def sample(evaluation_id: str, configuration: str, item: int, repeat: int) -> Select[Any]:
    """One graded answer with its item."""
    return (
        select(*WHOLE_SAMPLE)
        .join_from(RUNS, SAMPLES, _S.run_id == _R.id)
        .join(ITEMS, and_(_I.evaluation_id == _R.evaluation_id, _I.number == _S.item))
        .where(
            _R.evaluation_id == evaluation_id,
            _R.name == configuration,
            _S.item == item,
            _S.repeat == repeat,
        )
    )


# The caretaker's


def claim(
    holder: str, lease_seconds: float, *, served: Sequence[str] = (), full: Sequence[str] = ()
) -> Update:
    """An evaluation that is not over and that nobody holds, of the tenant whose turn it is; returns
    its row.
    """
    free = (
        select(_E.id)
        .where(_E.status.in_(_OPEN), _E.deleted_at.is_(None))
        .where(or_(_E.lease_until.is_(None), _E.lease_until < func.now()))
        .where(_E.tenant.not_in(list(full)))
        .order_by(turn_of(_E.tenant, served), _E.lease_until.asc().nulls_first(), _E.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return (
        update(EVALUATIONS)
        .where(_E.id == free)
        .values(holder=holder, lease_until=func.now() + seconds(lease_seconds))
        .returning(*_E)
    )


def hold(evaluation_id: str, holder: str, *, lease_seconds: float) -> Update:
    """Renew the lease, and lock the row; returns nothing when it is not ours any more."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.holder == holder, _E.status.in_(_OPEN))
        .values(lease_until=func.now() + seconds(lease_seconds))
        .returning(_E.id)
    )


def release(evaluation_id: str, holder: str, *, for_seconds: float) -> Update:
    """Let go; nobody looks at it again before that."""
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.holder == holder)
        .values(holder=None, lease_until=func.now() + seconds(for_seconds))
    )


def items(evaluation_id: str, first: int, last: int) -> Select[Any]:
    """Items `first` to `last`."""
    return (
        select(ITEMS)
        .where(_I.evaluation_id == evaluation_id, _I.number.between(first, last))
        .order_by(_I.number)
    )


def note_stored(run_id: str, stored: int) -> Update:
    return update(RUNS).where(_R.id == run_id).values(stored=stored)


def insert_samples(rows: Sequence[Mapping[str, Any]]) -> Executable:
    """One that is there already stays as it is."""
    return (
        insert(SAMPLES)
        .values(list(rows))
        .on_conflict_do_nothing(index_elements=[_S.run_id, _S.number])
    )


def to_grade(run_id: str, *, cancelled_too: bool, limit: int) -> Select[Any]:
    """Jobs of the run that are over and have no sample yet, with the item's columns."""
    over = [s.value for s in TERMINAL if cancelled_too or s is not JobStatus.CANCELLED]
    return (
        select(
            _J.id,
            _J.batch_line,
            _J.status,
            _J.result,
            _J.error,
            _J.usage,
            _J.timing,
            _J.diffusion,
            _J.started_at,
            _J.finished_at,
            _J.purged_at,
            _I.number,
            _I.data,
        )
        .join_from(JOBS, RUNS, _J.batch_id == _R.id)
        .join(EVALUATIONS, _E.id == _R.evaluation_id)
        .join(
            ITEMS,
            and_(
                _I.evaluation_id == _R.evaluation_id,
                _I.number == (_J.batch_line - 1) % _E["items"] + 1,
            ),
        )
        .where(
            _J.batch_id == run_id,
            _J.status.in_(over),
            ~exists().where(_S.run_id == run_id, _S.number == _J.batch_line),
        )
        .order_by(_J.batch_line)
        .limit(limit)
    )


def run_counts(run_id: str) -> Select[Any]:
    """(samples, open jobs) of a run."""
    graded = select(func.count()).where(_S.run_id == run_id).scalar_subquery()
    waiting = (
        select(func.count())
        .where(_J.batch_id == run_id, _J.status.in_(_OPEN_JOBS))
        .scalar_subquery()
    )
    return select(graded.label("graded"), waiting.label("open"))


def lost_samples(run_id: str, items: int, error: Mapping[str, Any]) -> Executable:
    """Samples whose jobs are not there any more (their ledger rows were forgotten): errors that say
    so.
    """
    stored = select(_R.stored).where(_R.id == run_id).scalar_subquery()
    # Of a table of its own: a bare `number` within the subqueries would be the sample's, compared
    # with itself.
    series = func.generate_series(1, stored).table_valued(column("number", Integer), name="numbers")
    number = series.render_derived().c.number
    gone = ~exists().where(_S.run_id == run_id, _S.number == number)
    rows = select(
        literal(run_id),
        number,
        (number - 1) % items + 1,
        (number - 1) // items,
        literal("error"),
        literal(dict(error), _S.error.type),
    ).where(gone, ~exists().where(_J.batch_id == run_id, _J.batch_line == number))
    names = ["run_id", "number", "item", "repeat", "outcome", "error"]
    return insert(SAMPLES).from_select(names, rows).on_conflict_do_nothing()


def cancel_jobs(run_id: str) -> Update:
    """The next open jobs that nobody cancelled yet; returns (id, status)."""
    some = (
        select(_J.id)
        .where(_J.batch_id == run_id, _J.status.in_(_OPEN_JOBS), ~_J.cancel_requested)
        .limit(CANCEL_CHUNK)
    )
    return jobs.cancel_where(_J.id.in_(some))


def expire_jobs(run_id: str) -> Update:
    """Expire the jobs whose window is over."""
    return jobs.expire_where(_J.batch_id == run_id)


def end_run(run_id: str, status: RunStatus, error: Mapping[str, Any] | None = None) -> Update:
    return (
        update(RUNS)
        .where(_R.id == run_id, _R.status == RunStatus.IN_PROGRESS.value)
        .values(
            status=status.value,
            error=null() if error is None else dict(error),
            finished_at=func.now(),
        )
    )


def finish(evaluation_id: str, holder: str) -> Update:
    """To its end, unless a run is not over."""
    mine = (_R.evaluation_id == _E.id,)
    running = exists().where(*mine, _R.status == RunStatus.IN_PROGRESS.value)
    well = exists().where(*mine, _R.status == RunStatus.COMPLETED.value)
    status = case(
        (_E.status == EvaluationStatus.CANCELLING.value, EvaluationStatus.CANCELLED.value),
        (well, EvaluationStatus.COMPLETED.value),
        else_=EvaluationStatus.FAILED.value,
    )
    return (
        update(EVALUATIONS)
        .where(_E.id == evaluation_id, _E.holder == holder, ~running)
        .values(status=status, finished_at=func.now(), holder=None, lease_until=None)
        .returning(_E.id, _E.status)
    )
