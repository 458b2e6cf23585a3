"""The whole at a glance, once or as a stream: jobs by state, open batches, what is queued, workers
and how fast they are.

A key sees its own tenant's jobs, the operator those of all. Workers serve everybody and are shown
to everybody, but on which machine they run is for `admin`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse
from sqlalchemy import Row

from api.auth import PrincipalDep
from api.changes import COST_SHARE, PACE_SECONDS
from api.dashboard.parameters import rules
from api.dependencies import Context, ContextDep
from api.followers import FollowingStream
from api.routes.metrics import queue_totals
from shared import counts as counted
from shared import serving
from shared.batches import repository as batches
from shared.batches.status import OVER, BatchStatus
from shared.jobs import lanes
from shared.jobs.status import JobStatus
from shared.keys.principal import Principal, Scope

router = APIRouter(prefix="/v1", tags=["overview"])

FRESH_SECONDS = PACE_SECONDS  # how old what several viewers share may be


def worker_object(row: Row[Any], *, live: bool, admin: bool) -> dict[str, Any]:
    """A worker; `recent` is how it did between its last two heartbeats."""
    stats = row.stats
    return {
        "id": row.id,
        "object": "worker",
        "model": row.model,
        "state": row.state if live or row.state == "stopped" else "lost",
        "device": row.device,
        "slots": row.slots,
        "version": row.version,
        "started_at": int(row.started_at.timestamp()),
        "last_beat_at": row.last_beat_at.timestamp(),
        "jobs_running": stats.get("jobs_running", 0) if live else 0,
        "memory_bytes": stats.get("memory_bytes"),
        "recent": stats.get("recent") if live else None,
        "hostname": row.hostname if admin else None,
        "pid": row.pid if admin else None,
    }


def failure_object(row: Row[Any], *, admin: bool) -> dict[str, Any]:
    """A worker that could not load its model. The reason may name folders, so it is for `admin`."""
    return {
        "object": "worker.failure",
        "model": row.model,
        "code": row.code,
        "message": row.message if admin else None,
        "count": row.count,
        "first_at": row.first_at.timestamp(),
        "last_at": row.last_at.timestamp(),
        "version": row.version,
        "hostname": row.hostname if admin else None,
        "pid": row.pid if admin else None,
    }


def viewer(principal: Principal) -> tuple[str | None, bool]:
    """Return (tenant, admin): callers for whom they are equal see the same overview. None is all
    tenants.
    """
    return None if principal.sees_all else principal.tenant, principal.may(Scope.ADMIN)


class Glance:
    """Reads the overview, at most once a second for each tenant."""

    def __init__(self) -> None:
        self._read: dict[tuple[str | None, bool], tuple[float, dict[str, Any]]] = {}
        self._reading = asyncio.Lock()

    async def at(self, context: Context, principal: Principal) -> dict[str, Any]:
        who = viewer(principal)
        async with self._reading:
            read_at, shown = self._read.get(who, (float("-inf"), {}))
            began = time.monotonic()
            if began - read_at >= FRESH_SECONDS:
                shown = await self._look(context, *who)
                now = time.monotonic()
                self._read = {k: v for k, v in self._read.items() if now - v[0] < FRESH_SECONDS}
                # Counting a very long ledger takes a while: looking at it must stay a small share
                # of the time.
                self._read[who] = (now + (COST_SHARE - 1) * (now - began), shown)
        return {
            **shown,
            "problems": await context.health.problems(),
        }  # the probe has a pace of its own

    async def _look(self, context: Context, tenant: str | None, admin: bool) -> dict[str, Any]:
        async with context.lists.read() as session:
            counts = {
                row.status: row.count
                for row in await session.execute(counted.jobs_by_status(tenant))
            }
            lanes_of = [
                d
                for d in await session.execute(lanes.depths())
                if tenant is None or d.tenant == tenant
            ]
            names = [(d.model, d.priority, d.tenant, d.key_id) for d in lanes_of]
            ages = (await session.execute(lanes.oldest(names))).all() if names else []
            open_batches = {
                r.status: r.count for r in await session.execute(batches.open_by_status(tenant))
            }
            rows = (
                await session.execute(
                    serving.recent_workers(stale_seconds=context.settings.worker_stale_seconds)
                )
            ).all()
            failures = (await session.execute(serving.recent_failures())).all()
        workers = [worker_object(row, live=row.live, admin=admin) for row in rows]
        return {
            "object": "overview",
            "scope": "all" if tenant is None else "own",
            "jobs": {status.value: counts.get(status.value, 0) for status in JobStatus},
            "batches": {
                status.value: open_batches.get(status.value, 0)
                for status in BatchStatus
                if status not in OVER
            },
            "queues": [
                {
                    "model": model,
                    "priority": priority,
                    "jobs": jobs,
                    "oldest_seconds": round(seconds, 1),
                }
                for (model, priority), (jobs, seconds) in sorted(
                    queue_totals(lanes_of, ages).items()
                )
            ],
            "workers": workers,
            "failures": [failure_object(row, admin=admin) for row in failures],
            "pace": pace_of([w["recent"] for w in workers if w["recent"]]),
        }


def pace_of(recent: list[dict[str, Any]]) -> dict[str, float | None]:
    """The live workers' pace together: tokens per second add up, ratios are means over those that
    worked.
    """

    def mean(name: str) -> float | None:
        values = [r[name] for r in recent if r.get(name) is not None]
        return round(sum(values) / len(values), 2) if values else None

    return {
        "tokens_per_second": round(sum(r.get("tokens_per_second") or 0.0 for r in recent), 1)
        if recent
        else None,
        "tokens_per_forward": mean("tokens_per_forward"),
        "batch": mean("batch"),
        "step_ms": mean("step_ms"),
    }


_glance = Glance()


@router.get("/overview")
async def overview(context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Jobs by state, queues, workers and their pace."""
    return await _glance.at(context, principal)


@router.get("/overview/events")
async def overview_events(context: ContextDep, principal: PrincipalDep) -> EventSourceResponse:
    """Server-sent events: `overview` with the same object whenever it changed, `trouble` while
    PostgreSQL is away.
    """
    key = viewer(principal)
    events = context.changes.follow("overview", key, lambda: _glance.at(context, principal))
    return FollowingStream(events, context.followers.enter(principal))


@router.get("/rules")
async def list_rules(principal: PrincipalDep) -> dict[str, Any]:
    """The unmasking rules, each with its parameters and what they mean; a form can be built from
    it.
    """
    return {"object": "list", "data": rules()}
