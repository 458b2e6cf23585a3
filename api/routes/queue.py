"""The queue: per model and priority what waits, what runs, who serves it, and when a job sent now
may be done.

Of other keys' jobs nothing is told but sums; `own` is what the caller's own key has there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from redis.exceptions import RedisError
from sqlalchemy import Row

from api.auth import PrincipalDep
from api.dependencies import Context, ContextDep
from api.paging import no_nul
from shared import serving
from shared.errors import ModelNotFound
from shared.jobs import estimate, lanes, queries, suspects
from shared.jobs.status import Priority
from shared.keys.principal import Principal
from shared.queue.names import queue_name
from shared.queue.window import MIN_WINDOW, REDIS_SECONDS

router = APIRouter(prefix="/v1", tags=["overview"])


async def _messages(context: Context, models: Sequence[str]) -> dict[tuple[str, str], int]:
    """Return how many messages each queue has in Redis; empty while Redis is away."""
    names = [(model, priority.value) for model in models for priority in Priority]
    try:
        pipe = context.redis.pipeline(transaction=False)
        for name in names:
            pipe.llen(queue_name(*name))
        async with asyncio.timeout(REDIS_SECONDS):
            return dict(zip(names, await pipe.execute(), strict=True))
    except (RedisError, OSError, TimeoutError):
        return {}


def _sum(depths: Sequence[Row[Any]], ages: Mapping[Any, float]) -> dict[str, Any]:
    mine = [ages.get((d.model, d.priority, d.tenant, d.key_id), 0.0) for d in depths]
    return {
        "waiting": sum(int(d.jobs) for d in depths),
        "waiting_tokens": sum(int(d.tokens) for d in depths),
        "oldest_seconds": round(max(mine), 1) if mine else None,
    }


class _Look:
    """The rows that were read once for all models."""

    def __init__(
        self,
        depths: Sequence[Row[Any]],
        suspected: Sequence[Row[Any]],
        ages: Sequence[Row[Any]],
        running: Sequence[Row[Any]],
        live: Sequence[Row[Any]],
    ) -> None:
        self._depths = depths
        self._turns = estimate.without_suspects(depths, suspected)
        self._ages = {(r.model, r.priority, r.tenant, r.key_id): float(r.seconds) for r in ages}
        self._running = running
        self._live = live

    def model(
        self,
        name: str,
        messages: Mapping[tuple[str, str], int],
        who: Principal,
        ranges: estimate.Calibration,
    ) -> Any:
        workers = [row._mapping for row in self._live if row.model == name]
        slots = sum(w["slots"] for w in workers)
        return {
            "object": "queue",
            "model": name,
            "workers": len(workers),
            "slots": slots,
            "window": max(slots, MIN_WINDOW),
            "lanes": [
                self._lane(name, p, messages.get((name, p.value)), workers, who, ranges)
                for p in Priority
            ],
        }

    def _lane(
        self,
        model: str,
        priority: Priority,
        messages: int | None,
        workers: Sequence[Mapping[Any, Any]],
        who: Principal,
        ranges: estimate.Calibration,
    ) -> dict[str, Any]:
        here = [d for d in self._depths if (d.model, d.priority) == (model, priority)]
        own = [d for d in here if (d.tenant, d.key_id) == (who.tenant, who.payer)]
        running = [r for r in self._running if (r.model, r.priority) == (model, priority)]
        mine = {"priority": priority, "tenant": who.tenant, "key_id": who.payer}
        turns = [d for d in self._turns if d["model"] == model]
        ahead = [
            d
            for d in turns
            if (d["priority"], d["tenant"], d["key_id"]) == (priority, who.tenant, who.payer)
        ]
        position = estimate.place(mine, turns, sum(d["jobs"] for d in ahead))
        eta = estimate.queued_eta(position, workers)
        return {
            "priority": priority.value,
            **_sum(here, self._ages),
            "messages": messages,
            "running": sum(r.jobs for r in running),
            "own": {
                **_sum(own, self._ages),
                "running": sum(
                    r.jobs for r in running if (r.tenant, r.key_id) == (who.tenant, who.payer)
                ),
            },
            "next_job": {
                "queue_position": position,
                "eta_seconds": eta,
                "eta_range_seconds": ranges.range_of(eta),
            },
        }


@router.get("/queue")
async def queue(
    request: Request, context: ContextDep, principal: PrincipalDep, model: str | None = None
) -> dict[str, Any]:
    """Per model and priority: waiting, running, oldest, workers, and a forecast for a job that the
    caller would send now.
    """
    no_nul(request)
    async with context.database.read() as session:
        known = [row.name for row in await session.execute(serving.list_models())]
        if model is not None and model not in known:
            raise ModelNotFound(f"no worker ever served the model {model[:80]!r}", param="model")
        names = known if model is None else [model]
        depths = (await session.execute(lanes.depths(model))).all()
        suspected = (await session.execute(suspects.per_lane(model))).all()
        of = [(d.model, d.priority, d.tenant, d.key_id) for d in depths]
        ages = (await session.execute(lanes.oldest(of))).all() if of else []
        running = (await session.execute(queries.running())).all()
        live = (
            await session.execute(
                serving.live_workers(stale_seconds=context.settings.worker_stale_seconds)
            )
        ).all()
    messages = await _messages(context, names)
    look = _Look(depths, suspected, ages, running, live)
    return {
        "object": "list",
        "data": [
            look.model(n, messages, principal, await context.forecasts.calibration(n))
            for n in names
        ],
    }
