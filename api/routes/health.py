"""Liveness, readiness and the version."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError

from api.dependencies import Context, ContextDep
from shared import serving
from shared.health import describe_database

router = APIRouter(tags=["health"])
CHECK_TIMEOUT_S = 3.0


def version() -> str:
    try:
        return distribution_version("vdiff")
    except PackageNotFoundError:
        return "0+unknown"


async def _state(context: Context) -> dict[str, Any]:
    """Return what `/health` shows. PostgreSQL and Redis are written to; the rest is read."""
    database, redis = await asyncio.gather(context.health.database(), context.health.redis())
    state: dict[str, Any] = {
        "database": "ok" if database is None else str(database),
        "redis": "ok" if redis is None else str(redis),
        "models": 0,
        "workers": 0,
    }
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S), context.database.read() as session:
            state["models"] = len((await session.execute(serving.list_models())).all())
            stale = context.settings.worker_stale_seconds
            state["workers"] = len(
                (await session.execute(serving.live_workers(stale_seconds=stale))).all()
            )
    except (SQLAlchemyError, OSError, TimeoutError) as exc:
        if database is None:
            state["database"] = str(describe_database(exc))
    return state


@router.get("/health")
async def health(context: ContextDep) -> JSONResponse:
    """Report the state of every part. 200 while jobs can be accepted, whatever else is wrong; 503
    otherwise.
    """
    state = await _state(context)
    good = state["database"] == "ok"
    status = (
        "ok"
        if good and state["redis"] == "ok" and state["workers"]
        else "degraded"
        if good
        else "down"
    )
    return JSONResponse({"status": status, "version": version(), **state}, 200 if good else 503)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/health/ready")
async def ready(context: ContextDep) -> JSONResponse:
    """200 when a job can be accepted: PostgreSQL takes writes, and a worker registered a model, now
    or earlier.

    Without Redis jobs are accepted and wait, so the answer stays 200 and its status is `degraded`.
    """
    state = await _state(context)
    if state["database"] != "ok":
        return JSONResponse(
            {"status": "not ready", "reason": f"database: {state['database']}"}, 503
        )
    if not state["models"]:
        return JSONResponse(
            {"status": "not ready", "reason": "no worker has registered a model yet"}, 503
        )
    counts = {"models": state["models"], "workers": state["workers"]}
    if state["redis"] != "ok":
        return JSONResponse({"status": "degraded", "reason": f"redis: {state['redis']}", **counts})
    return JSONResponse({"status": "ready", **counts})


@router.get("/version")
async def show_version() -> dict[str, str]:
    return {"server": "vdiff", "version": version()}
