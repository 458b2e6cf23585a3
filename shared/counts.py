"""All SQL of the counts by state: they cost the same whether a thousand jobs have ended or ten
million.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from sqlalchemy import (
    BigInteger,
    Executable,
    Select,
    Table,
    delete,
    func,
    literal,
    select,
    union_all,
)
from sqlalchemy import cast as cast_to
from sqlalchemy.dialects.postgresql import insert

from shared.db.tables import Count, CountDelta, Job, Lane, LaneDelta

COUNTS = cast(Table, Count.__table__)
DELTAS = cast(Table, CountDelta.__table__)
_J = cast(Table, Job.__table__).c
_OF = ("kind", "tenant", "status")
ROLLUP_BATCH = 20_000
Kind = Literal["job", "batch", "evaluation", "file"]


def roll_up() -> Executable:
    """Move what changed into `counts`; two at once share the work."""
    some = (
        select(DELTAS.c.id)
        .order_by(DELTAS.c.id)
        .limit(ROLLUP_BATCH)
        .with_for_update(skip_locked=True)
    )
    gone = delete(DELTAS).where(DELTAS.c.id.in_(some)).returning(*DELTAS.c).cte("gone")
    of = [gone.c[name] for name in _OF]
    sums = (
        select(*of, func.sum(gone.c.amount), func.sum(gone.c.bytes)).group_by(*of).order_by(*of)
    )  # no deadlock
    adding = insert(COUNTS).from_select([*_OF, "amount", "bytes"], sums)
    return adding.on_conflict_do_update(
        index_elements=[COUNTS.c[name] for name in _OF],
        set_={name: COUNTS.c[name] + adding.excluded[name] for name in ("amount", "bytes")},
    )


def by_status(kind: Kind, tenant: str | None = None) -> Select[Any]:
    """(status, count, bytes) of everything of a kind; None is all tenants. For jobs see
    `jobs_by_status`.
    """
    whole = union_all(
        *(
            select(t.c.status, t.c.amount, t.c.bytes).where(
                t.c.kind == kind, *(() if tenant is None else (t.c.tenant == tenant,))
            )
            for t in (COUNTS, DELTAS)
        )
    ).subquery("whole")
    count = cast_to(func.sum(whole.c.amount), BigInteger)
    size = cast_to(func.sum(whole.c.bytes), BigInteger)
    return (
        select(whole.c.status, count.label("count"), size.label("bytes"))
        .group_by(whole.c.status)
        .having(func.sum(whole.c.amount) > 0)
    )


def jobs_by_status(tenant: str | None = None) -> Select[Any]:
    """(status, count) of all jobs; None is all tenants."""

    def own(column: Any) -> tuple[Any, ...]:
        return () if tenant is None else (column == tenant,)

    ended = by_status("job", tenant).subquery("ended")
    lanes = [cast(Table, t.__table__).c for t in (Lane, LaneDelta)]
    queued = union_all(*(select(t.jobs).where(*own(t.tenant)) for t in lanes)).subquery(
        "queued_jobs"
    )
    waiting = cast_to(func.coalesce(func.sum(queued.c.jobs), 0), BigInteger)
    return (
        union_all(
            select(ended.c.status, ended.c.count),
            select(literal("queued"), waiting),
            select(literal("running"), func.count()).where(_J.status == "running", *own(_J.tenant)),
        )
        .subquery("states")
        .select()
    )
