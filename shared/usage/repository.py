"""All SQL of usage: summed up as lanes are (`shared.jobs.lanes`), and read with what nobody has
summed up yet.
"""

from __future__ import annotations

from datetime import date
from typing import Any, cast

from sqlalchemy import Executable, Select, Table, delete, func, select, union_all
from sqlalchemy.dialects.postgresql import insert

from shared.db.tables import Usage, UsageDelta

USAGE = cast(Table, Usage.__table__)
DELTAS = cast(Table, UsageDelta.__table__)
ROLLUP_BATCH = 20_000
OF = ("tenant", "day", "key_id", "model")
AMOUNTS = (
    "succeeded",
    "failed",
    "cancelled",
    "expired",
    "attempts",
    "prompt_tokens",
    "completion_tokens",
    "forwards",
    "run_seconds",
    "device_seconds",
)


def roll_up() -> Executable:
    """Move what ended into `usage`; two at once share the work."""
    some = (
        select(DELTAS.c.id)
        .order_by(DELTAS.c.id)
        .limit(ROLLUP_BATCH)
        .with_for_update(skip_locked=True)
    )
    gone = delete(DELTAS).where(DELTAS.c.id.in_(some)).returning(*DELTAS.c).cte("gone")
    of = [gone.c[name] for name in OF]
    sums = (
        select(*of, *(func.sum(gone.c[name]) for name in AMOUNTS)).group_by(*of).order_by(*of)
    )  # no deadlock
    adding = insert(USAGE).from_select([*OF, *AMOUNTS], sums)
    return adding.on_conflict_do_update(
        index_elements=[USAGE.c[name] for name in OF],
        set_={name: USAGE.c[name] + adding.excluded[name] for name in AMOUNTS},
    )


def used(
    tenant: str | None,
    *,
    first: date,
    last: date,
    model: str | None = None,
    key_id: str | None = None,
) -> Select[Any]:
    """Every column of `usage`, newest day first; None as the tenant is all."""
    whole = union_all(
        *(
            select(*(t.c[name] for name in (*OF, *AMOUNTS))).where(t.c.day.between(first, last))
            for t in (USAGE, DELTAS)
        )
    ).subquery("whole")
    of = [whole.c[name] for name in OF]
    query = select(*of, *(func.sum(whole.c[name]).label(name) for name in AMOUNTS)).group_by(*of)
    for name, wanted in (("tenant", tenant), ("model", model), ("key_id", key_id)):
        if wanted is not None:
            query = query.where(whole.c[name] == wanted)
    return query.order_by(whole.c.day.desc(), whole.c.tenant, whole.c.key_id, whole.c.model)
