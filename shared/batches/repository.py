"""All SQL about batches. Whatever the caretaker writes carries its `holder`: one that lost its
lease changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Executable,
    Select,
    Table,
    Text,
    Update,
    any_,
    case,
    func,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from shared.batches.status import OVER, BatchStatus
from shared.db.expressions import seconds, turn_of
from shared.db.tables import Batch
from shared.jobs import repository as jobs
from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus

BATCHES = cast(Table, Batch.__table__)
_B, _J = BATCHES.c, JOBS.c
_OPEN_JOBS = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)
_LOST = (JobStatus.FAILED.value, JobStatus.CANCELLED.value, JobStatus.EXPIRED.value)
PAGE = 200
ITEM = [
    _J.id,
    _J.custom_id,
    _J.batch_id,
    _J.batch_line,
    _J.status,
    _J.error,
    _J.usage,
    _J.timing,
    _J.attempt,
    _J.purged_at,
]
CANCEL_CHUNK = 2_000


def create(values: Mapping[str, Any], window_seconds: float) -> Executable:
    """Returns the row, or nothing when the tenant used the idempotency key before."""
    return (
        insert(BATCHES)
        .values(
            **values, window_seconds=window_seconds, expires_at=func.now() + seconds(window_seconds)
        )
        .on_conflict_do_nothing(
            index_elements=[_B.tenant, _B.idempotency_key],
            index_where=_B.idempotency_key.is_not(None),
        )
        .returning(*_B)
    )


def by_idempotency_key(tenant: str, key: str) -> Select[Any]:
    return select(BATCHES).where(_B.tenant == tenant, _B.idempotency_key == key)


def same_request(tenant: str, key_id: str, request_hash: str, within_seconds: float) -> Select[Any]:
    return (
        select(BATCHES)
        .where(_B.tenant == tenant, _B.key_id == key_id, _B.request_hash == request_hash)
        .where(_B.created_at > func.now() - seconds(within_seconds))
        .order_by(_B.id.desc())
        .limit(1)
    )


def get(batch_id: str, tenant: str) -> Select[Any]:
    return select(BATCHES).where(_B.id == batch_id, _B.tenant == tenant)


def get_many(batch_ids: Sequence[str]) -> Select[Any]:
    return select(BATCHES).where(_B.id == any_(literal(list(batch_ids), ARRAY(Text))))


def list_batches(tenant: str, *, after: str | None, limit: int) -> Select[Any]:
    """Newest first, one row more than asked."""
    query = select(BATCHES).where(_B.tenant == tenant)
    if after is not None:
        query = query.where(_B.id < after)
    return query.order_by(_B.id.desc()).limit(limit + 1)


def open_by_status(tenant: str | None) -> Select[Any]:
    """(status, count) of the batches that are not over; None is all tenants."""
    query = select(_B.status, func.count().label("count")).where(
        _B.status.not_in([s.value for s in OVER])
    )
    return (query if tenant is None else query.where(_B.tenant == tenant)).group_by(_B.status)


def counts(batch_id: str) -> Select[Any]:
    """(status, count) of its jobs."""
    return (
        select(_J.status, func.count().label("count"))
        .where(_J.batch_id == batch_id)
        .group_by(_J.status)
    )


def counts_of(batch_ids: Sequence[str]) -> Select[Any]:
    """(batch_id, status, count) of the jobs of many batches."""
    wanted = _J.batch_id == any_(literal(list(batch_ids), ARRAY(Text)))
    return (
        select(_J.batch_id, _J.status, func.count()).where(wanted).group_by(_J.batch_id, _J.status)
    )


def lines_open() -> Select[Any]:
    """Select the number of lines that have not ended in open batches, including those that are no
    jobs yet.
    """
    over = [s.value for s in OVER]
    unfinished = select(_B.id).where(_B.status.not_in(over))
    jobs_open = (
        select(func.count())
        .where(_J.batch_id.in_(unfinished), _J.status.in_(_OPEN_JOBS))
        .scalar_subquery()
    )
    unstored = (
        select(func.coalesce(func.sum(func.coalesce(_B.total, 0) - _B.stored), 0))
        .where(_B.status.not_in(over))
        .scalar_subquery()
    )
    return select(jobs_open + unstored)


def items(batch_id: str, *, status: str | None, after_line: int, limit: int) -> Select[Any]:
    """Its jobs in the order of the lines, one row more than asked."""
    query = select(*ITEM).where(_J.batch_id == batch_id, _J.batch_line > after_line)
    if status is not None:
        query = query.where(_J.status == status)
    return query.order_by(_J.batch_line).limit(limit + 1)


def item(batch_id: str, line: int) -> Select[Any]:
    """One line's job, with its result."""
    return select(*ITEM, _J.result).where(_J.batch_id == batch_id, _J.batch_line == line)


def results(batch_id: str, *, succeeded: bool, after_line: int) -> Select[Any]:
    """A page of what goes into the output file, or into the error file."""
    wanted = _J.status == JobStatus.SUCCEEDED.value
    return (
        select(_J.id, _J.custom_id, _J.batch_line, _J.status, _J.result, _J.error, _J.purged_at)
        .where(
            _J.batch_id == batch_id, _J.batch_line > after_line, wanted if succeeded else ~wanted
        )
        .order_by(_J.batch_line)
        .limit(PAGE)
    )


def usage(batch_id: str) -> Select[Any]:
    """(prompt, completion) tokens of all lines."""

    def total(name: str) -> Any:
        return func.coalesce(func.sum(_J.usage[name].astext.cast(BigInteger)), 0).label(name)

    return select(total("prompt_tokens"), total("completion_tokens")).where(_J.batch_id == batch_id)


def top_errors(batch_id: str, limit: int = 5) -> Select[Any]:
    """(code, count, message) of what went wrong, the most frequent first."""
    code = _J.error["code"].astext
    return (
        select(
            code.label("code"),
            func.count().label("count"),
            func.min(_J.error["message"].astext).label("message"),
        )
        .where(_J.batch_id == batch_id, _J.status.in_(_LOST))
        .group_by(code)
        .order_by(func.count().desc(), code)
        .limit(limit)
    )


# What a request asks for; the caretaker does it


def request_cancel(batch_id: str) -> Update:
    """validating, in_progress -> cancelling; finalizing stays what it is, and what is over stays
    over.
    """
    sources = (BatchStatus.VALIDATING.value, BatchStatus.IN_PROGRESS.value)
    return (
        update(BATCHES)
        .where(_B.id == batch_id, _B.status.in_(sources))
        .values(
            status=BatchStatus.CANCELLING.value,
            cancelling_at=func.now(),
            holder=None,
            lease_until=None,
        )
        .returning(_B.id)
    )


def reopen(batch_id: str, holder: str, *, lease_seconds: float) -> Update:
    """completed, expired, cancelled -> in_progress with a new window, for `retry_lines` in the same
    transaction.

    The batch is held until all its lines are retried, so that no caretaker closes it between two
    chunks. A caretaker that was about to close it loses it. One more call renews the lease and
    keeps the window.
    """
    sources = (BatchStatus.COMPLETED.value, BatchStatus.EXPIRED.value, BatchStatus.CANCELLED.value)
    ends = (
        "finalizing_at",
        "completed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
        "summary",
    )
    return (
        update(BATCHES)
        .where(
            _B.id == batch_id,
            or_(_B.status == BatchStatus.IN_PROGRESS.value, _B.status.in_(sources)),
        )
        .where(_B.stored == _B.total)
        .values(
            status=BatchStatus.IN_PROGRESS.value,
            expires_at=case(
                (_B.status == BatchStatus.IN_PROGRESS.value, _B.expires_at),
                else_=func.now() + func.make_interval(0, 0, 0, 0, 0, 0, _B.window_seconds),
            ),
            holder=holder,
            lease_until=func.now() + seconds(lease_seconds),
            **dict.fromkeys(ends, null()),
        )
        .returning(_B.expires_at)
    )


def to_retry(batch_id: str, *, after: int = 0, limit: int | None = None) -> Select[Any]:
    """(lines, tokens, last) that `retry_lines` would give another life: of all lines, or of the
    next ones after a line.
    """
    some = (
        select(_J.batch_line, _J.tokens)
        .where(_J.batch_id == batch_id, _J.batch_line > after, jobs.is_retriable())
        .order_by(_J.batch_line)
        .limit(limit)
        .subquery("some")
    )
    lines: Any = func.count()
    tokens = func.coalesce(func.sum(some.c.tokens), 0).cast(BigInteger)
    return select(
        lines.label("lines"), tokens.label("tokens"), func.max(some.c.batch_line).label("last")
    )


def retry_lines(
    batch_id: str, expires_at: datetime, *, key_id: str, after: int, last: int
) -> Update:
    """Give the lines of a range that did not succeed another life, paid by that key; return their
    ids.
    """
    deadlines = {"start_by": null(), "complete_by": expires_at}
    lines = (_J.batch_id == batch_id, _J.batch_line > after, _J.batch_line <= last)
    return jobs.retry_where(*lines, deadlines=deadlines).values(key_id=key_id)


# The caretaker's


def _has_open_jobs() -> Any:
    return select(_J.id).where(_J.batch_id == _B.id, _J.status.in_(_OPEN_JOBS)).exists()


def claim(
    holder: str, lease_seconds: float, *, served: Sequence[str] = (), full: Sequence[str] = ()
) -> Update:
    """A batch that needs somebody and that nobody holds, of the tenant whose turn it is; returns
    its row.
    """
    storing = _B.stored < func.coalesce(_B.total, 0)
    in_progress = (_B.status == BatchStatus.IN_PROGRESS.value) & or_(storing, ~_has_open_jobs())
    others = (
        BatchStatus.VALIDATING.value,
        BatchStatus.CANCELLING.value,
        BatchStatus.FINALIZING.value,
    )
    free = (
        select(_B.id)
        .where(or_(_B.status.in_(others), in_progress))
        .where(
            or_(_B.lease_until.is_(None), _B.lease_until < func.now()), _B.tenant.not_in(list(full))
        )
        .order_by(turn_of(_B.tenant, served), _B.lease_until.asc().nulls_first(), _B.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    return (
        update(BATCHES)
        .where(_B.id == free)
        .values(holder=holder, lease_until=func.now() + seconds(lease_seconds))
        .returning(*_B)
    )


def move(
    batch_id: str, holder: str, *statuses: BatchStatus, lease_seconds: float, **values: Any
) -> Update:
    """Write, and renew the lease; returns nothing when the batch is not ours or not in one of the
    states any more.
    """
    return (
        update(BATCHES)
        .where(_B.id == batch_id, _B.holder == holder, _B.status.in_([s.value for s in statuses]))
        .values(**values, lease_until=func.now() + seconds(lease_seconds))
        .returning(*_B)
    )


def hold(batch_id: str, holder: str, *, lease_seconds: float) -> Update:
    """Renew the lease of a batch that is not over."""
    return (
        update(BATCHES)
        .where(_B.id == batch_id, _B.holder == holder, _B.status.not_in([s.value for s in OVER]))
        .values(lease_until=func.now() + seconds(lease_seconds))
    )


def finish(
    batch_id: str, holder: str, status: BatchStatus, *, now_column: str, **values: Any
) -> Update:
    """To an end."""
    assert status in OVER
    return (
        update(BATCHES)
        .where(_B.id == batch_id, _B.holder == holder, _B.status.not_in([s.value for s in OVER]))
        .values(
            status=status.value, holder=None, lease_until=None, **values, **{now_column: func.now()}
        )
        .returning(_B.id)
    )


def release(batch_id: str, holder: str, *, for_seconds: float) -> Update:
    """Let go; nobody looks at it again before that."""
    return (
        update(BATCHES)
        .where(_B.id == batch_id, _B.holder == holder)
        .values(holder=None, lease_until=func.now() + seconds(for_seconds))
    )


def open_jobs(batch_id: str) -> Select[Any]:
    """Return whether a line is queued or running."""
    return select(select(_J.id).where(_J.batch_id == batch_id, _J.status.in_(_OPEN_JOBS)).exists())


def cancel_lines(batch_id: str) -> Update:
    """The next lines that nobody cancelled yet; returns (id, status) as
    `shared.jobs.repository.request_cancel`.
    """
    some = (
        select(_J.id)
        .where(_J.batch_id == batch_id, _J.status.in_(_OPEN_JOBS), ~_J.cancel_requested)
        .limit(CANCEL_CHUNK)
    )
    return jobs.cancel_where(_J.id.in_(some))


def expire_lines(batch_id: str) -> Update:
    """Expire the lines whose window is over."""
    return jobs.expire_where(_J.batch_id == batch_id)
