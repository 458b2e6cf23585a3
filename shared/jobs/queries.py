"""Statements on the jobs table that only the API runs. `shared.jobs.repository` has the moves.
Callers execute them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    Executable,
    Select,
    Text,
    Update,
    column,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from shared.db.expressions import seconds
from shared.jobs.repository import ATTEMPTS, JOBS
from shared.jobs.status import TERMINAL, JobStatus

_J = JOBS.c
SAME_MAX = 50  # jobs of one request among which a retry finds its own
# A job without its prompt and body, which only its owner's replay needs.
PUBLIC = [
    _J.id,
    _J.tenant,
    _J.key_id,
    _J.endpoint,
    _J.model,
    _J.status,
    _J.priority,
    _J.custom_id,
    _J.metadata,
    _J.batch_id,
    _J.created_at,
    _J.queued_at,
    _J.started_at,
    _J.finished_at,
    _J.attempt,
    _J.progress,
    _J.result,
    _J.error,
    _J.usage,
    _J.timing,
    _J.diffusion,
    _J.params,
    _J.cancel_requested,
    _J.life,
    _J.start_by,
    _J.complete_by,
    _J.max_run_seconds,
    _J.retain_seconds,
    _J.purged_at,
    _J.replay_of,
    _J.revision,
    _J.tokens,
    _J.deadline,
    _J.webhook,
    _J.losses,
    _J.isolation,
]

# What a list shows: nothing without a bound, nothing that PostgreSQL keeps apart from the row
# (TOAST).
LISTED = [column for column in PUBLIC if column.name not in ("result", "params")]


def insert_job(values: Mapping[str, Any]) -> Executable:
    """Add a queued job; returns its id, or nothing when the tenant used the idempotency key before."""
    return (
        insert(JOBS)
        .values(**values)
        .on_conflict_do_nothing(
            index_elements=[_J.tenant, _J.idempotency_key],
            index_where=_J.idempotency_key.is_not(None),
        )
        .returning(_J.id)
    )


def insert_lines(rows: Sequence[Mapping[str, Any]] | None = None) -> Executable:
    """Add the queued jobs of a batch's lines; a line that is there already stays as it is. The
    dispatcher pushes them.

    Args:
        rows: None: the statement is executed with them, one prepared statement for all. 250 rows of
            VALUES cost more to compile than to store.
    """
    statement = insert(JOBS) if rows is None else insert(JOBS).values(list(rows))
    return statement.on_conflict_do_nothing(
        index_elements=[_J.batch_id, _J.batch_line], index_where=_J.batch_id.is_not(None)
    )


def by_idempotency_key(tenant: str, key: str) -> Select[Any]:
    """Args: key: as it is stored, `Principal.scoped`."""
    return select(*PUBLIC, _J.request_hash).where(_J.tenant == tenant, _J.idempotency_key == key)


def same_request(tenant: str, key_id: str, request_hash: str, within_seconds: float) -> Select[Any]:
    """(id, status) of the jobs that the same request made lately and that may still give its
    answer, newest first.
    """
    since = func.now() - seconds(within_seconds)
    useful = (JobStatus.QUEUED.value, JobStatus.RUNNING.value, JobStatus.SUCCEEDED.value)
    return (
        select(_J.id, _J.status)
        .where(
            _J.tenant == tenant,
            _J.key_id == key_id,
            _J.request_hash == request_hash,
            _J.created_at > since,
            _J.status.in_(useful),
            ~_J.cancel_requested,
            _J.idempotency_key.is_(None),
        )
        .order_by(_J.created_at.desc())
        .limit(SAME_MAX)
    )


def get(job_id: str, tenant: str) -> Select[Any]:
    return select(*PUBLIC).where(_J.id == job_id, _J.tenant == tenant)


def for_replay(job_id: str, tenant: str) -> Select[Any]:
    """A job with what it was asked."""
    return select(*PUBLIC, _J.body, _J.prompt_token_ids, _J.max_attempts).where(
        _J.id == job_id, _J.tenant == tenant
    )


def result_of(job_id: str, tenant: str) -> Select[Any]:
    return select(_J.result).where(_J.id == job_id, _J.tenant == tenant)


def steps_of(job_id: str, tenant: str) -> Select[Any]:
    return select(_J.steps).where(_J.id == job_id, _J.tenant == tenant)


def attempts(job_id: str) -> Select[Any]:
    return select(ATTEMPTS).where(ATTEMPTS.c.job_id == job_id).order_by(ATTEMPTS.c.attempt)


def over_of(job_ids: Sequence[str]) -> Select[Any]:
    """Select those of these jobs that are over, or are not there any more; one statement for any
    number of them.
    """
    given = (
        func.unnest(literal(list(job_ids), ARRAY(Text)))
        .table_valued(column("id", Text))
        .render_derived()
    )
    return (
        select(given.c.id)
        .select_from(given.outerjoin(JOBS, _J.id == given.c.id))
        .where(or_(_J.id.is_(None), _J.status.in_([status.value for status in TERMINAL])))
    )


def note_forecast(job_id: str, seconds: float) -> Update:
    """Store the forecast that the client got when it submitted, to be compared with what came."""
    return (
        update(JOBS)
        .where(_J.id == job_id, _J.forecast_seconds.is_(None))
        .values(forecast_seconds=seconds)
    )


def running() -> Select[Any]:
    """(model, priority, tenant, key_id, jobs) of what runs: as many rows as there are slots are
    read.
    """
    of = (_J.model, _J.priority, _J.tenant, _J.key_id)
    return (
        select(*of, func.count().label("jobs"))
        .where(_J.status == JobStatus.RUNNING.value)
        .group_by(*of)
    )


def oldest_overdue_lease() -> Select[Any]:
    """Seconds since the oldest expired lease of a running job ran out; 0 when none has."""
    late = func.extract("epoch", func.now() - func.min(_J.lease_until))
    return select(func.greatest(func.coalesce(late, 0), 0)).where(
        _J.status == JobStatus.RUNNING.value, _J.lease_until < func.now()
    )
