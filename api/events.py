"""Following a job: its stream in Redis, with PostgreSQL as the judge of the end and the way on when Redis is away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from api.changes import STREAM_SECONDS
from api.dependencies import Context
from shared.db.session import is_outage
from shared.events import FIRST, REREAD_SECONDS
from shared.jobs.service import is_over
from shared.jobs.views import job_object

BLOCK_MS = 1_000
LAST_BLOCK_MS = 300  # how long the events just before the end may trail the row
AWAY_SECONDS = 0.5  # between looks at a Redis or a PostgreSQL that does not answer

Item = tuple[str, str, dict[str, Any]]  # id, type, data


async def _read(context: Context, job_id: str, after: str, block_ms: int) -> list[Item]:
    try:
        return await context.events.read(job_id, after, block_ms)
    except (RedisError, OSError):
        await asyncio.sleep(AWAY_SECONDS)
        return []


async def follow(
    context: Context, job_id: str, tenant: str, after: str | None = None
) -> AsyncIterator[Item | Row[Any] | None]:
    """The job's events after an id; None now and then when there are none; at last the finished row.

    Ends without the row when this process is told to stop: the client comes back with the last id.
    """
    position = after or FIRST
    read_at = float("-inf")
    while not context.stopping.is_set():
        items = await _read(context, job_id, position, BLOCK_MS if read_at > 0 else 1)
        heard_end = False
        for item in items:
            if item[1] == "done":
                heard_end = True
            else:
                position = item[0]
                yield item
        if heard_end or not items or time.monotonic() - read_at > REREAD_SECONDS:
            try:
                row = await context.jobs.get(job_id, tenant)
            except (SQLAlchemyError, OSError) as exc:
                if not is_outage(exc):
                    raise
                await asyncio.sleep(AWAY_SECONDS)  # the database comes back, and the job with it
                yield None
                continue
            read_at = time.monotonic()
            if is_over(row):
                if not heard_end:
                    for item in await _read(context, job_id, position, LAST_BLOCK_MS):
                        if item[1] != "done":
                            yield item
                yield row
                return
            if heard_end:  # of an earlier life of the job
                position = items[-1][0]
        if not items:
            yield None


async def job_events(context: Context, row: Row[Any], after: str | None) -> AsyncIterator[bytes]:
    """The native stream. Who resumes after `done` gets `done` again, and nothing else."""

    def sent(event_id: str, kind: str, data: Any) -> bytes:
        return format_sse_event(data_str=json.dumps(data, separators=(",", ":")), event=kind, id=event_id)

    last, until = after or FIRST, time.monotonic() + STREAM_SECONDS
    if after is None:
        yield sent(FIRST, "queued", {"id": row.id, "queued_at": row.queued_at.timestamp()})
    async for item in follow(context, row.id, row.tenant, after):
        if time.monotonic() > until:
            return
        if item is None:
            yield KEEPALIVE_COMMENT
        elif isinstance(item, Row):
            yield sent(last, "done", job_object(item._mapping))
        else:
            last = item[0]
            yield sent(*item)
