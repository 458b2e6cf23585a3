"""What the dashboard's first page asks: jobs by state; of one tenant, or of all for an operator.

What is queued is in `shared.jobs.lanes`, counted as it changes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select

from shared.jobs.repository import JOBS

_J = JOBS.c


def by_status(tenant: str | None) -> Select[Any]:
    """(status, count); None is all tenants."""
    query = select(_J.status, func.count().label("count")).group_by(_J.status)
    return query if tenant is None else query.where(_J.tenant == tenant)
