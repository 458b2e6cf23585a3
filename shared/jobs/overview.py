"""What the dashboard's first page asks: jobs by state and what is queued; of one tenant, or of all for an operator."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, extract, func, select

from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus

_J = JOBS.c


def by_status(tenant: str | None) -> Select[Any]:
    """(status, count); None is all tenants."""
    query = select(_J.status, func.count().label("count")).group_by(_J.status)
    return query if tenant is None else query.where(_J.tenant == tenant)


def queued(tenant: str | None) -> Select[Any]:
    """(model, priority, count, oldest_seconds) of what is queued."""
    age = extract("epoch", func.now() - func.min(_J.queued_at))
    query = (
        select(_J.model, _J.priority, func.count().label("count"), age.label("oldest_seconds"))
        .where(_J.status == JobStatus.QUEUED.value)
        .group_by(_J.model, _J.priority)
        .order_by(_J.model, _J.priority)
    )
    return query if tenant is None else query.where(_J.tenant == tenant)
