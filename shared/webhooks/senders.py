"""The processes that send webhooks: their rows and their heartbeat. Statements for both kinds of
session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import Insert, Select, Table, Update, func, insert, select, update

from shared.db.expressions import seconds
from shared.db.tables import Sender, WebhookDelivery, WebhookEndpoint

SENDERS = cast(Table, Sender.__table__)
_S, _D, _E = (
    SENDERS.c,
    cast(Table, WebhookDelivery.__table__).c,
    cast(Table, WebhookEndpoint.__table__).c,
)


def register(sender_id: str, *, hostname: str, pid: int, version: str) -> Insert:
    return insert(SENDERS).values(id=sender_id, hostname=hostname, pid=pid, version=version)


def beat(sender_id: str, metrics: Sequence[Any], *, state: str = "ready") -> Update:
    return (
        update(SENDERS)
        .where(_S.id == sender_id)
        .values(metrics=list(metrics), state=state, last_beat_at=func.now())
    )


def live(*, stale_seconds: float) -> Select[Any]:
    """Senders heard of lately, oldest first."""
    since = func.now() - seconds(stale_seconds)
    return (
        select(SENDERS)
        .where(_S.state == "ready", _S.last_beat_at >= since)
        .order_by(_S.started_at, _S.id)
    )


def all_metrics() -> Select[Any]:
    """(metrics,) of every sender that ever was."""
    return select(_S.metrics)


def waiting() -> Select[Any]:
    """(pending, late_seconds): deliveries to be made, and for how long the first of them has been
    due.
    """
    late = func.extract("epoch", func.now() - func.min(_D.next_attempt_at))
    return select(
        func.count().label("pending"),
        func.greatest(0, func.coalesce(late, 0)).label("late_seconds"),
    ).where(_D.status == "pending")


def endpoints() -> Select[Any]:
    """(enabled, count)."""
    return (
        select(_E.enabled, func.count().label("count"))
        .where(_E.deleted_at.is_(None))
        .group_by(_E.enabled)
    )
