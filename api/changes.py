"""A stream that tells one object whenever it changed, for pages that follow something without asking again and again.

It reads on the pace of the stream and never for more than a small share of the time, says `trouble` while PostgreSQL is away,
and ends by itself, so that a client's key is looked at again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import SQLAlchemyError

from api.dependencies import Context

PACE_SECONDS = 1.0
COST_SHARE = 20  # one part of so many, at most, goes into reading
KEEPALIVE_SECONDS = 15.0
STREAM_SECONDS = 600.0  # then the client comes again, and its key is looked at again


async def changes(
    context: Context,
    event: str,
    read: Callable[[], Awaitable[dict[str, Any]]],
    *,
    is_over: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> AsyncIterator[bytes]:
    """Server-sent events: `event` with what `read` gave; the last one is called `done` once `is_over` says so."""
    last, sent_at, began = "", time.monotonic(), time.monotonic()
    while not context.stopping.is_set() and time.monotonic() - began < STREAM_SECONDS:
        asked_at = time.monotonic()
        shown: dict[str, Any] | None = None
        try:
            shown = await read()
        except (SQLAlchemyError, OSError):
            yield format_sse_event(data_str='{"code":"database_unavailable"}', event="trouble")
        cost = time.monotonic() - asked_at
        text = "" if shown is None else json.dumps(shown, separators=(",", ":"))
        if shown is not None and is_over(shown):
            yield format_sse_event(data_str=text, event="done")
            return
        if text and text != last:
            last, sent_at = text, time.monotonic()
            yield format_sse_event(data_str=text, event=event)
        elif time.monotonic() - sent_at > KEEPALIVE_SECONDS:
            sent_at = time.monotonic()
            yield KEEPALIVE_COMMENT
        await asyncio.sleep(max(PACE_SECONDS, (COST_SHARE - 1) * cost))
