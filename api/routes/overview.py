"""The whole at a glance, once or as a stream: jobs by state, what is queued, workers and how fast they are.

A key sees its own tenant's jobs; with the scope `admin` those of all. Workers serve everybody and are shown to everybody,
but on which machine they run is for `admin`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from api.auth import PrincipalDep
from api.dashboard.parameters import rules
from api.dependencies import Context, ContextDep
from api.routes.metrics import queue_totals
from shared import serving
from shared.jobs import lanes
from shared.jobs import overview as statements
from shared.jobs.status import JobStatus
from shared.keys.principal import Principal, Scope

router = APIRouter(prefix="/v1", tags=["overview"])

FRESH_SECONDS = 1.0  # how old what several viewers share may be; also the pace of the stream
COST_SHARE = 20  # one part of so many, at most, goes into counting
KEEPALIVE_SECONDS = 15.0
STREAM_SECONDS = 600.0  # then the client comes again, and its key is looked at again


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


class Glance:
    """Reads the overview, at most once a second for each tenant."""

    def __init__(self) -> None:
        self._read: dict[tuple[str | None, bool], tuple[float, dict[str, Any]]] = {}
        self._reading = asyncio.Lock()

    async def at(self, context: Context, principal: Principal) -> dict[str, Any]:
        admin = principal.may(Scope.ADMIN)
        who = (None if admin else principal.tenant, admin)
        async with self._reading:
            read_at, shown = self._read.get(who, (float("-inf"), {}))
            began = time.monotonic()
            if began - read_at >= FRESH_SECONDS:
                shown = await self._look(context, *who)
                now = time.monotonic()
                self._read = {k: v for k, v in self._read.items() if now - v[0] < FRESH_SECONDS}
                # Counting a very long ledger takes a while: looking at it must stay a small share of the time.
                self._read[who] = (now + (COST_SHARE - 1) * (now - began), shown)
        return shown

    async def _look(self, context: Context, tenant: str | None, admin: bool) -> dict[str, Any]:
        async with context.database.read() as session:
            counts = {row.status: row.count for row in await session.execute(statements.by_status(tenant))}
            lanes_of = [d for d in await session.execute(lanes.depths()) if tenant is None or d.tenant == tenant]
            names = [(d.model, d.priority, d.tenant, d.key_id) for d in lanes_of]
            ages = (await session.execute(lanes.oldest(names))).all() if names else []
            rows = (
                await session.execute(serving.recent_workers(stale_seconds=context.settings.worker_stale_seconds))
            ).all()
        workers = [worker_object(row, live=row.live, admin=admin) for row in rows]
        return {
            "object": "overview",
            "scope": "all" if admin else "own",
            "jobs": {status.value: counts.get(status.value, 0) for status in JobStatus},
            "queues": [
                {"model": model, "priority": priority, "jobs": jobs, "oldest_seconds": round(seconds, 1)}
                for (model, priority), (jobs, seconds) in sorted(queue_totals(lanes_of, ages).items())
            ],
            "workers": workers,
            "pace": pace_of([w["recent"] for w in workers if w["recent"]]),
        }


def pace_of(recent: list[dict[str, Any]]) -> dict[str, float | None]:
    """The live workers' pace together: tokens per second add up, ratios are means over those that worked."""

    def mean(name: str) -> float | None:
        values = [r[name] for r in recent if r.get(name) is not None]
        return round(sum(values) / len(values), 2) if values else None

    return {
        "tokens_per_second": round(sum(r.get("tokens_per_second") or 0.0 for r in recent), 1) if recent else None,
        "tokens_per_forward": mean("tokens_per_forward"),
        "batch": mean("batch"),
        "step_ms": mean("step_ms"),
    }


_glance = Glance()


@router.get("/overview")
async def overview(context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Jobs by state, queues, workers and their pace."""
    return await _glance.at(context, principal)


async def _changes(context: Context, principal: Principal) -> AsyncIterator[bytes]:
    last, sent_at, began = "", time.monotonic(), time.monotonic()
    while not context.stopping.is_set() and time.monotonic() - began < STREAM_SECONDS:
        try:
            text = json.dumps(await _glance.at(context, principal), separators=(",", ":"))
        except (SQLAlchemyError, OSError):
            text = ""
            yield format_sse_event(data_str='{"code":"database_unavailable"}', event="trouble")
        if text and text != last:
            last, sent_at = text, time.monotonic()
            yield format_sse_event(data_str=text, event="overview")
        elif time.monotonic() - sent_at > KEEPALIVE_SECONDS:
            sent_at = time.monotonic()
            yield KEEPALIVE_COMMENT
        await asyncio.sleep(FRESH_SECONDS)


@router.get("/overview/events")
async def overview_events(context: ContextDep, principal: PrincipalDep) -> EventSourceResponse:
    """Server-sent events: `overview` with the same object whenever it changed, `trouble` while PostgreSQL is away."""
    return EventSourceResponse(_changes(context, principal))


@router.get("/rules")
async def list_rules(principal: PrincipalDep) -> dict[str, Any]:
    """The unmasking rules, each with its parameters and what they mean; a form can be built from it."""
    return {"object": "list", "data": rules()}
