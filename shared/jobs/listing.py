"""Pages of jobs, newest first, at a cost that does not grow with the ledger.

Whatever is filtered, a page reads at most `WINDOW` entries of one index in the list's order, and
the rows that it shows:

    status, model, both, batch    an index in the list's order
    created_after                 a bound of the id, which begins with the time; `created_at`
                                  decides near the bound
    metadata                      the newest `WINDOW` jobs first; the index of metadata (GIN) for
                                  what is rarer than that

A window may end before a page is full. Then the page is short, even empty, and `next_id` says where
the next one goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, lateral, select, text, true, tuple_, union_all
from sqlalchemy.exc import DBAPIError

from shared.db.lists import is_canceled
from shared.db.session import AsyncDatabase
from shared.ids import first_id
from shared.jobs.queries import LISTED
from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus

_J = JOBS.c
WINDOW = 10_000
RARE_TIMEOUT_MS = 1_000
# An id is made before its row is stored, by another machine's clock.
CLOCKS_APART = timedelta(minutes=15)
_FIRST, _LAST = "job_" + "0" * 26, "job_" + "z" * 26


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs of a tenant a list shows."""

    tenant: str
    status: str | None = None
    model: str | None = None
    batch_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_after: datetime | None = None
    before_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    rows: list[Row[Any]]
    next_id: str | None  # where the next page goes on; None at the end


def _in_order(wanted: JobFilter, limit: int, *of: tuple[Any, str]) -> Select[Any]:
    """The newest ids with these values, by the index that has these columns and then the id.

    Compared as rows, so that no other index gives the order: with plain equalities the planner may
    read the tenant's whole ledger in the order of the ids, when it takes the values for common
    ones.
    """
    columns = [*(column for column, _ in of), _J.id]
    values = [value for _, value in of]
    after = (
        _FIRST
        if wanted.created_after is None
        else first_id("job", wanted.created_after - CLOCKS_APART)
    )
    return (
        select(_J.id)
        .where(
            tuple_(*columns) < tuple_(*values, wanted.before_id or _LAST),
            tuple_(*columns) > tuple_(*values, after),
            *(column.is_not(None) for column, _ in of if column.nullable),  # of a partial index
        )
        .order_by(*(column.desc() for column in columns))
        .limit(limit)
    )


def candidates(wanted: JobFilter, limit: int) -> Select[Any]:
    """Ids in the list's order that one index gives; `_rest` has what that index does not know."""
    tenant, model = (_J.tenant, wanted.tenant), (_J.model, wanted.model or "")
    if wanted.batch_id is not None:
        return _in_order(wanted, limit, (_J.batch_id, wanted.batch_id))
    if wanted.model is not None and wanted.status is None:
        # One index serves model alone too: the newest of each state, merged.
        states = [
            _in_order(wanted, limit, tenant, model, (_J.status, status.value))
            for status in JobStatus
        ]
        newest = union_all(*(one.subquery().select() for one in states)).subquery("newest")
        return select(newest.c.id).order_by(newest.c.id.desc()).limit(limit)
    if wanted.status is None:
        return _in_order(wanted, limit, tenant)
    if wanted.model is None:
        return _in_order(wanted, limit, tenant, (_J.status, wanted.status))
    return _in_order(wanted, limit, tenant, model, (_J.status, wanted.status))


def _rest(wanted: JobFilter) -> list[ColumnElement[bool]]:
    """Return the conditions that must be checked in each candidate's row."""
    found: list[ColumnElement[bool]] = []
    if wanted.batch_id is not None:
        found.append(_J.tenant == wanted.tenant)
        if wanted.status is not None:
            found.append(_J.status == wanted.status)
        if wanted.model is not None:
            found.append(_J.model == wanted.model)
    if wanted.metadata:
        found.append(_J.metadata.contains(dict(wanted.metadata)))
    if wanted.created_after is not None:
        found.append(_J.created_at > wanted.created_after)
    return found


def of_window(wanted: JobFilter, limit: int) -> Select[Any]:
    """The first rows that fit among the candidates of one window."""
    rest = _rest(wanted)
    found = candidates(wanted, WINDOW if rest else limit).subquery("candidates")
    # OFFSET 0: each row is looked up by its id and then looked at, whatever the planner thinks of
    # other indexes.
    row = lateral(select(JOBS).where(_J.id == found.c.id, *rest).offset(0))
    shown = [row.c[column.name] for column in LISTED]
    return select(*shown).join_from(found, row, true()).order_by(found.c.id.desc()).limit(limit)


def end_of_window(wanted: JobFilter) -> Select[Any]:
    """The last id of a window that is full; nothing when it reaches the end of the list."""
    return candidates(wanted, WINDOW).offset(WINDOW - 1).limit(1)


def of_rare_metadata(wanted: JobFilter, limit: int) -> Select[Any]:
    """The same rows by way of the index of metadata, all that match at once."""
    where = [_J.tenant == wanted.tenant, _J.metadata.contains(dict(wanted.metadata))]
    if wanted.before_id is not None:
        where.append(_J.id < wanted.before_id)
    for column, value in (
        (_J.status, wanted.status),
        (_J.model, wanted.model),
        (_J.batch_id, wanted.batch_id),
    ):
        if value is not None:
            where.append(column == value)
    if wanted.created_after is not None:
        where.append(_J.created_at > wanted.created_after)
    found = (
        select(_J.id).where(*where).cte("found").prefix_with("MATERIALIZED", dialect="postgresql")
    )
    newest = select(found.c.id).order_by(found.c.id.desc()).limit(limit).subquery("newest")
    return (
        select(*LISTED).join_from(newest, JOBS, _J.id == newest.c.id).order_by(newest.c.id.desc())
    )


async def read_page(database: AsyncDatabase, wanted: JobFilter, size: int) -> Page:
    """Read the next page of at most `size` jobs."""
    async with database.read() as session:
        rows = list((await session.execute(of_window(wanted, size + 1))).all())
        if len(rows) > size:
            return Page(rows[:size], rows[size - 1].id)
        if not _rest(wanted):
            return Page(rows, None)
        end = (await session.execute(end_of_window(wanted))).scalar_one_or_none()
    if end is None:
        return Page(rows, None)
    if wanted.metadata and not rows:
        found = await _rare(database, wanted, size)
        if found is not None:
            return Page(found[:size], found[size - 1].id if len(found) > size else None)
    return Page(rows, end)


async def _rare(database: AsyncDatabase, wanted: JobFilter, size: int) -> list[Row[Any]] | None:
    """Rows by the index of metadata; None when too many match for that."""
    try:
        async with AsyncDatabase.write(database) as session:
            await session.execute(text(f"SET LOCAL statement_timeout = {RARE_TIMEOUT_MS}"))
            await session.execute(text("SET LOCAL enable_seqscan = off"))
            return list((await session.execute(of_rare_metadata(wanted, size + 1))).all())
    except DBAPIError as exc:
        if not is_canceled(exc):
            raise
        return None
