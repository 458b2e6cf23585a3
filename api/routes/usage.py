"""Usage: jobs, tokens, model calls and seconds, per key, model and day."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request

from api.auth import PrincipalDep
from api.dependencies import ContextDep
from api.paging import no_nul
from shared.errors import Forbidden, InvalidParameter
from shared.keys.principal import Scope
from shared.usage import repository

router = APIRouter(prefix="/v1", tags=["overview"])

DEFAULT_DAYS, MAX_DAYS = 30, 366
_COUNTED = tuple(name for name in repository.AMOUNTS if not name.endswith("_seconds"))
_ENDS = ("succeeded", "failed", "cancelled", "expired")


def _day(value: str | None, param: str, default: date) -> date:
    if value is None:
        return default
    try:
        return date.fromisoformat(value)
    except ValueError as exc:
        raise InvalidParameter(f"{param} must be a day, YYYY-MM-DD", param=param) from exc


def amounts(rows: Iterable[Mapping[Any, Any]]) -> dict[str, Any]:
    """The rows together, as the wire names them. Pure."""
    totals: dict[str, float] = dict.fromkeys(repository.AMOUNTS, 0)
    for row in rows:
        for name in repository.AMOUNTS:
            totals[name] += row[name]
    shown: dict[str, Any] = {name: int(totals[name]) for name in _COUNTED}
    ends = {name: shown.pop(name) for name in _ENDS}
    return {
        "jobs": {"total": sum(ends.values()), **ends},
        **shown,
        "total_tokens": shown["prompt_tokens"] + shown["completion_tokens"],
        "run_seconds": round(totals["run_seconds"], 3),
        "device_seconds": round(totals["device_seconds"], 3),
    }


@router.get("/usage")
async def usage(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    since: str | None = None,
    until: str | None = None,
    model: str | None = None,
    key_id: str | None = None,
) -> dict[str, Any]:
    """Return a row per day (UTC), key and model, newest first, and the total.

    A key sees the rows of its tenant, the operator those of all tenants. A key that has neither the
    scope `jobs` nor `batches` sees its own rows only.
    """
    no_nul(request)
    last = _day(until, "until", datetime.now(UTC).date())
    first = _day(
        since,
        "since",
        last - timedelta(days=DEFAULT_DAYS - 1)
        if last > date.min + timedelta(DEFAULT_DAYS)
        else last,
    )
    if first > last:
        raise InvalidParameter("since is after until", param="since")
    if (last - first).days >= MAX_DAYS:
        raise InvalidParameter(f"since and until span more than {MAX_DAYS} days", param="since")
    everyone = principal.sees_all
    if not (principal.may(Scope.JOBS) or principal.may(Scope.BATCHES)):
        if key_id not in (None, principal.payer):
            raise Forbidden(
                "the usage of other keys needs the scope 'jobs' or 'batches', which this API key lacks",
                param="key_id",
            )
        key_id = principal.payer
    statement = repository.used(
        None if everyone else principal.tenant, first=first, last=last, model=model, key_id=key_id
    )
    async with context.lists.read() as session:
        rows = [row._mapping for row in await session.execute(statement)]
    return {
        "object": "usage",
        "scope": "all" if everyone else "own",
        "since": first.isoformat(),
        "until": last.isoformat(),
        "data": [
            {
                "object": "usage.row",
                "day": row["day"].isoformat(),
                "tenant": row["tenant"],
                "key_id": row["key_id"] or None,
                "model": row["model"],
                **amounts([row]),
            }
            for row in rows
        ],
        "total": amounts(rows),
    }
