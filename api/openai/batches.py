"""`/v1/batches`, OpenAI's, and beside it `items` and `retry_failed`."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.sse import EventSourceResponse

from api.auth import PrincipalDep, requires
from api.dependencies import ContextDep, JsonBody, idempotency_key, is_automatic_retry
from api.followers import FollowingStream
from api.openai.files import expires_seconds
from api.paging import no_nul, page_limit, page_object, whole_number
from shared import checks
from shared.batches.service import NewBatch
from shared.batches.status import OVER
from shared.batches.views import item_object, listed_item
from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.jobs.fields import metadata_of
from shared.jobs.responses import ENDPOINTS
from shared.jobs.status import JobStatus
from shared.keys.principal import Scope

router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[requires(Scope.BATCHES)])

FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
MAX_PAGE, DEFAULT_PAGE = 100, 20
MAX_ITEMS, DEFAULT_ITEMS = 1_000, 100
WINDOW_SECONDS_MIN, WINDOW_SECONDS_MAX = 60.0, 30 * 86_400.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input_file_id", "endpoint", "completion_window"],
                    "additionalProperties": False,
                    "properties": {
                        "input_file_id": {"type": "string"},
                        "endpoint": {"type": "string", "enum": list(ENDPOINTS)},
                        "completion_window": {"type": "string", "examples": ["24h", "30m", "7d"]},
                        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                        "output_expires_after": {"type": "object"},
                    },
                }
            }
        },
    }
}


def window_seconds(value: Any) -> float:
    """Parse `completion_window`: a number and s, m, h or d; from a minute to 30 days. Raises
    InvalidParameter.
    """
    found = re.fullmatch(r"(\d{1,7})([smhd])", value) if isinstance(value, str) else None
    seconds = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    if not WINDOW_SECONDS_MIN <= seconds <= WINDOW_SECONDS_MAX:
        message = "completion_window must be a time like 24h, 30m or 7d, from 60s to 30d"
        raise InvalidParameter(message, param="completion_window")
    return seconds


def new_batch(request: Request, body: Any, principal: Any) -> NewBatch:
    """The body, checked. Raises the kinds of InvalidRequest."""
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be an object", param="body")
    for name in body:
        if name not in FIELDS:
            message = f"{name[:80]} is not a field of a batch; known: {', '.join(FIELDS)}"
            raise UnknownParameter(message, param=name[:80])
    given = {k: v for k, v in body.items() if v is not None}
    for name in FIELDS[:3]:
        if name not in given:
            raise MissingParameter(f"{name} is required", param=name)
    if not isinstance(given["input_file_id"], str):
        raise InvalidParameter("input_file_id must be a string", param="input_file_id")
    if given["endpoint"] not in ENDPOINTS:
        raise InvalidParameter(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    expires = given.get("output_expires_after")
    if isinstance(expires, dict):
        expires = checks.known(expires, ("anchor", "seconds"), "output_expires_after.")
    if expires is not None and (
        not isinstance(expires, dict) or set(expires) != {"anchor", "seconds"}
    ):
        message = "output_expires_after must be an object of anchor and seconds"
        raise InvalidParameter(message, param="output_expires_after")
    return NewBatch(
        principal=principal,
        input_file_id=given["input_file_id"],
        endpoint=given["endpoint"],
        completion_window=given["completion_window"],
        window_seconds=window_seconds(given["completion_window"]),
        metadata=metadata_of(given["metadata"], "metadata") if "metadata" in given else None,
        output_expires_seconds=None
        if expires is None
        else expires_seconds(expires["anchor"], expires["seconds"], "output_expires_after"),
        idempotency_key=idempotency_key(request),
        automatic_retry=is_automatic_retry(request),
    )


@router.post("", openapi_extra=_SCHEMA)
async def create_batch(
    request: Request, body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Accept a batch; its lines are checked next (`validating`), and a single bad one fails it
    before any has run.
    """
    return await context.batches.show(
        await context.batches.create(new_batch(request, body, principal))
    )


@router.get("")
async def list_batches(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: str | None = None,
) -> dict[str, Any]:
    """The tenant's batches, newest first."""
    no_nul(request)
    size = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)
    rows = await context.batches.page(principal.tenant, after=after, limit=size)
    return page_object(await context.batches.show_many(rows), size)


@router.get("/{batch_id}")
async def get_batch(batch_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """The batch; `request_counts` are live."""
    return await context.batches.show(await context.batches.get(batch_id, principal.tenant))


@router.get("/{batch_id}/events")
async def batch_events(
    batch_id: str, context: ContextDep, principal: PrincipalDep
) -> EventSourceResponse:
    """Server-sent events: `batch` with the same object whenever it changed, `done` with it once it
    is over.
    """

    async def read() -> dict[str, Any]:
        return await context.batches.show(await context.batches.get(batch_id, principal.tenant))

    await context.batches.get(
        batch_id, principal.tenant
    )  # an unknown one is 404, not an empty stream
    events = context.changes.follow(
        "batch",
        (batch_id, principal.tenant),
        read,
        is_over=lambda batch: batch["status"] in OVER,
        read_all=context.batches.read_many,
    )
    return FollowingStream(events, context.followers.enter(principal))


@router.post("/{batch_id}/cancel")
async def cancel_batch(
    batch_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Stop what has not ended; what has keeps its results, and they are in the output file."""
    return await context.batches.show(await context.batches.cancel(batch_id, principal.tenant))


@router.post("/{batch_id}/retry_failed")
async def retry_failed(
    batch_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Run every line again that failed, expired or was cancelled; the batch is `in_progress` again,
    with a new window.
    """
    row, retried = await context.batches.retry_failed(batch_id, principal)
    return {**await context.batches.show(row), "retried": retried}


@router.get("/{batch_id}/items")
async def list_items(
    request: Request,
    batch_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    status: str | None = None,
    cursor: str | None = None,
    limit: str | None = None,
) -> dict[str, Any]:
    """The lines that are jobs, in their order, also while the batch runs, without results; `status`
    filters, `next_cursor` goes on.
    """
    no_nul(request)
    if status is not None and status not in list(JobStatus):
        raise InvalidParameter(f"status must be one of {', '.join(JobStatus)}", param="status")
    if cursor is not None and not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= 9):
        raise InvalidParameter("cursor must be the next_cursor of another page", param="cursor")
    size = page_limit(limit, DEFAULT_ITEMS, MAX_ITEMS)
    rows = await context.batches.items(
        batch_id, principal.tenant, status=status, after_line=int(cursor or 0), limit=size
    )
    page = [listed_item(row._mapping) for row in rows[:size]]
    more = len(rows) > size
    return {
        "object": "list",
        "data": page,
        "has_more": more,
        "next_cursor": str(page[-1]["line"]) if more else None,
    }


@router.get("/{batch_id}/items/{line}")
async def get_item(
    batch_id: str, line: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """One line that is a job, with its `response` or `error` once it is over."""
    number = whole_number(line)
    if number is None:
        raise InvalidParameter("line must be the number of a line of the input file", param="line")
    return item_object((await context.batches.item(batch_id, principal.tenant, number))._mapping)
