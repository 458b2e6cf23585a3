"""The steps by which a finished job's answer came about."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from api.auth import PrincipalDep, requires
from api.dependencies import ContextDep
from api.routes.jobs import gone
from shared.errors import Conflict, NotFound
from shared.jobs import queries
from shared.jobs.service import is_over
from shared.jobs.steps import unpacked
from shared.jobs.views import urls
from shared.keys.principal import Scope

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[requires(Scope.JOBS)])


@router.get("/{job_id}/steps")
async def steps(request: Request, job_id: str, context: ContextDep, principal: PrincipalDep) -> Any:
    """Which step committed which token, of a job that is over; 404 when that was not kept."""
    row = await context.jobs.get(job_id, principal.tenant)
    if row.purged_at is not None:
        return await gone(context, request, row)
    if not is_over(row):
        raise Conflict(
            f"the job is {row.status}; follow {urls(row.id)['events']}", code="job_not_done"
        )
    async with context.database.read() as session:
        kept = (await session.execute(queries.steps_of(job_id, principal.tenant))).scalar_one()
    if kept is None:
        raise NotFound(
            "this job's steps were not kept (VDIFF_KEEP_STEPS_TOKENS)", code="steps_not_kept"
        )
    return {"object": "job.steps", "job_id": job_id, **await asyncio.to_thread(unpacked, kept)}
