"""Counts of what the duties of `shared.maintenance` did, over all processes since the beginning.
Statements.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Insert, Select, Table, exists, func, select
from sqlalchemy.dialects.postgresql import insert

from shared.db.expressions import seconds
from shared.db.tables import MaintenanceCount

COUNTS = cast(Table, MaintenanceCount.__table__)


def add(action: str, amount: int) -> Insert:
    """Count `amount` more, in the transaction that did it."""
    adding = insert(COUNTS).values(action=action, total=amount)
    return adding.on_conflict_do_update(
        index_elements=[COUNTS.c.action],
        set_={"total": COUNTS.c.total + adding.excluded.total, "updated_at": func.now()},
    )


def totals() -> Select[Any]:
    """(action, total)."""
    return select(COUNTS.c.action, COUNTS.c.total)


def happened_within(action: str, limit_seconds: float) -> Select[Any]:
    """Select whether the action was counted in the last `limit_seconds`, by the database's clock.

    A time in the future does not count: after a failover, the clock of the new primary can be
    behind.
    """
    limit = seconds(limit_seconds)
    recent = COUNTS.c.updated_at.between(func.now() - limit, func.now())
    return select(exists().where(COUNTS.c.action == action, recent))
