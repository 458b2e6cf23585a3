"""Since when leases could be renewed: they do not run out while nobody could renew them.

Every worker and every API process writes a pulse every few seconds. A gap between two pulses means
that PostgreSQL took no writes: it was stopped, frozen or read-only, or another primary with another
clock took over. After a gap the sweeper waits for one full lease before it takes a job from its
worker, so that every live worker has renewed its leases by then. The clock is a row, so a sweeper
that started a moment ago knows as much as one that saw the outage.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Executable, Select, Table, case, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from shared.db.expressions import seconds
from shared.db.tables import LeaseClock

CLOCK = cast(Table, LeaseClock.__table__)
_C = CLOCK.c
_ROW = 1
GAP_SHARE = 0.4  # of a lease; heartbeats come at least every third of one
GAP_MIN_SECONDS = 2.0
_OFTEN = 8  # pulses that come closer than this part of a gap write nothing


def gap_seconds(lease_seconds: float) -> float:
    """Return how far apart two pulses may be before the time between them counts as an outage."""
    return max(GAP_SHARE * lease_seconds, GAP_MIN_SECONDS)


def pulse(*, lease_seconds: float) -> Executable:
    """Note that PostgreSQL takes writes now, in a transaction of its own."""
    gap = gap_seconds(lease_seconds)
    passed = func.now() - _C.at
    back = passed < seconds(-gap)  # another primary, whose clock is behind
    adding = insert(CLOCK).values(id=_ROW, at=func.now(), since=func.now())
    return adding.on_conflict_do_update(
        index_elements=[_C.id],
        set_={
            "at": case((back, func.now()), else_=func.greatest(_C.at, func.now())),
            "since": case((or_(back, passed > seconds(gap)), func.now()), else_=_C.since),
        },
        where=or_(back, passed > seconds(gap / _OFTEN)),
    )


def is_steady(*, lease_seconds: float) -> Select[Any]:
    """Return whether leases could be renewed all the time for one lease, as of this transaction.

    False without a row. Ask in the transaction that acts on the answer: both then have the same
    `now()`.
    """
    gap = seconds(gap_seconds(lease_seconds))
    steady = (
        (_C.since <= func.now() - seconds(lease_seconds))
        & (_C.at >= func.now() - gap)
        & (_C.at <= func.now() + gap)
    )
    return select(func.coalesce(func.bool_or(steady), False)).where(_C.id == _ROW)
