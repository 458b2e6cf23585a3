"""Following a job: its stream in Redis, with PostgreSQL as the judge of the end and the way on when
Redis is away.

A follower sleeps until its watch (`shared.watch`) wakes it, then reads what is new at its own pace.
Nothing is queued for it: a client that reads slowly finds the events in Redis, or misses those that
the bounded stream lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from api.changes import KEEPALIVE_SECONDS, STREAM_SECONDS
from api.dependencies import Context
from shared.db.session import is_outage
from shared.events import FIRST, IGNORED, Item
from shared.jobs.service import is_over
from shared.jobs.views import job_object
from shared.watch import Watch

LAST_SECONDS = 0.3  # how long the events just before the end may trail the row
# between looks at a Redis or a PostgreSQL that does not answer, unless something wakes the follower
AWAY_SECONDS = 2.0


async def follow(
    context: Context, job_id: str, tenant: str, after: str | None = None
) -> AsyncIterator[Item | Row[Any] | None]:
    """Yield the job's events after an id, None now and then when there are none, and at last the
    finished row.

    Ends without the row when this process is told to stop: the client comes back with the last id.
    """
    position = after or FIRST
    look, heard_end = (
        True,
        False,
    )  # whether to read the row; whether the stream says that the job is over
    with context.waiter.watching(job_id) as watch:
        while not context.stopping.is_set():
            look = watch.clear() or look
            patience = KEEPALIVE_SECONDS
            try:
                items = await context.events.read(job_id, position)
            except (RedisError, OSError):
                items, patience = [], AWAY_SECONDS
            for item in items:
                position = item[0]
                heard_end = item[1] == "done"  # perhaps of an earlier life: the row decides
                look = look or heard_end
                if not heard_end and item[1] != IGNORED:
                    yield item
            if items and not heard_end:
                continue  # until none are left
            if look:
                try:
                    row = await context.jobs.get_shared(job_id, tenant)
                except (SQLAlchemyError, OSError) as exc:
                    if not is_outage(exc):
                        raise
                    patience = AWAY_SECONDS  # the database comes back, and the job with it
                else:
                    if is_over(row):
                        if not heard_end:
                            async for item in _trailing(context, job_id, position, watch):
                                yield item
                        yield row
                        return
                    look = heard_end = False
                    if items:
                        continue
            if not await watch.wait(patience):
                yield None


async def _trailing(
    context: Context, job_id: str, position: str, watch: Watch
) -> AsyncIterator[Item]:
    """Yield what was still on its way to Redis when the job ended."""
    until = time.monotonic() + LAST_SECONDS
    while not context.stopping.is_set():
        watch.clear()
        try:
            items = await context.events.read(job_id, position)
        except (RedisError, OSError):
            return
        for item in items:
            position = item[0]
            if item[1] == "done":
                return
            if item[1] != IGNORED:
                yield item
        remaining = until - time.monotonic()
        if not items and (remaining <= 0 or not await watch.wait(remaining)):
            return


async def job_events(context: Context, row: Row[Any], after: str | None) -> AsyncIterator[bytes]:
    """Yield the native stream. A client that resumes after `done` gets `done` again, and nothing
    else.
    """

    def sent(event_id: str, kind: str, data: Any) -> bytes:
        return format_sse_event(
            data_str=json.dumps(data, separators=(",", ":")), event=kind, id=event_id
        )

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
