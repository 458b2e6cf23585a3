"""`/v1/responses`, OpenAI's Responses API: jobs that the request waits for, streams, or leaves in
the background.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy import Row

from api.auth import CallerDep, PrincipalDep, requires
from api.backpressure import Visit
from api.dependencies import Context, ContextDep, JsonBody
from api.events import follow
from api.followers import Place
from api.openai.leaving import Stay, StayingStream
from api.openai.response_events import ResponseEvents
from api.openai.routes import Way, answer, body_schema, serve
from api.openai.sse import Diverged
from api.paging import no_nul, page_limit, page_object, whole_number
from shared.errors import InvalidParameter, JobNotFound
from shared.jobs.response_objects import input_items, of_row
from shared.jobs.response_requests import job_id_of, messages_of
from shared.jobs.responses import RESPONSES
from shared.jobs.service import Prepared
from shared.jobs.status import Priority
from shared.jobs.tasks import ResponseTask, task_of
from shared.jobs.views import urls
from shared.keys.principal import Principal
from shared.keys.principal import Scope as KeyScope

creating = APIRouter(
    tags=["openai"], dependencies=[requires(KeyScope.JOBS, counted=False)]
)  # `serve` counts
router = APIRouter(prefix=RESPONSES, tags=["openai"], dependencies=[requires(KeyScope.JOBS)])

UNSTORED_SECONDS = 60.0  # `store: false`: input and output are purged so long after the end
ITEMS_PAGE, ITEMS_PAGE_MAX = 20, 100
CANCEL_SECONDS = 5.0  # how long a cancel waits for the end, which one denoising step brings


@creating.post(RESPONSES, openapi_extra=body_schema("input"))
async def create_response(
    request: Request, body: JsonBody, context: ContextDep, principal: CallerDep
) -> Response:
    """OpenAI's Responses API: waits for the answer, streams it, or with `background` comes back at
    once.
    """
    given = body if isinstance(body, dict) else {}
    background = given.get("background") is True
    way = Way(
        reply=_reply,
        priority=Priority.NORMAL if background else Priority.INTERACTIVE,
        retain_seconds=UNSTORED_SECONDS
        if given.get("store") is False
        else context.settings.default_retain_seconds,
        stays=background,
    )
    return await serve(request, body, context, principal, RESPONSES, way)


async def _reply(
    request: Request, context: Context, prepared: Prepared, staying: Stay, visit: Visit
) -> Response:
    given = prepared.values["body"]
    if given.get("stream"):
        return ResponseStream(context, staying.job_id, staying.tenant, staying=staying)
    if given.get("background"):
        row = await context.jobs.get(staying.job_id, staying.tenant)
        return JSONResponse(of_row(row._mapping), headers={"X-Job-Id": row.id})
    return await answer(request, context, staying, visit.remaining_seconds)


async def _row(context: Context, response_id: str, principal: Principal) -> Row[Any]:
    """The response's job. Raises JobNotFound: there is none, or nothing is left of it."""
    try:
        row = await context.jobs.get(job_id_of(response_id), principal.tenant)
    except JobNotFound:
        row = None
    task = None if row is None else task_of(row.params)
    if row is None or not isinstance(task, ResponseTask) or not task.shown["store"]:
        message = f"no response {response_id[:80]!r}"
        raise JobNotFound(message, param="response_id", code="response_not_found")
    return row


@router.get("/{response_id}")
async def get_response(
    response_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    stream: str | None = None,
    starting_after: str | None = None,
) -> Response:
    """The response as it stands; with `stream=true` its events, those after `starting_after` alone."""
    row = await _row(context, response_id, principal)
    if stream not in (None, "true", "false"):
        raise InvalidParameter("stream must be true or false", param="stream")
    if stream != "true":
        if starting_after is not None:
            raise InvalidParameter(
                "starting_after has no effect without stream=true", param="starting_after"
            )
        return JSONResponse(of_row(row._mapping), headers={"X-Job-Id": row.id})
    after = None
    if starting_after is not None:
        after = whole_number(starting_after)
        if after is None:
            raise InvalidParameter(
                "starting_after must be a sequence number", param="starting_after"
            )
    return ResponseStream(
        context, row.id, row.tenant, after=after, place=context.followers.enter(principal)
    )


@router.get("/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: str | None = None,
    order: str = "desc",
) -> dict[str, Any]:
    """List the input items of the response, without those that came before by
    `previous_response_id`.
    """
    no_nul(request)
    if order not in ("asc", "desc"):
        raise InvalidParameter("order must be asc or desc", param="order")
    size = page_limit(limit, ITEMS_PAGE, ITEMS_PAGE_MAX)
    row = await _row(context, response_id, principal)
    body = await context.jobs.body(row.id, principal.tenant)
    items = input_items(messages_of(body["input"]), response_id)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidParameter(f"after: there is no item {after[:80]!r}", param="after")
        items = items[ids.index(after) + 1 :]
    return page_object(items[: size + 1], size)


@router.post("/{response_id}/cancel")
async def cancel_response(
    response_id: str, context: ContextDep, principal: PrincipalDep
) -> JSONResponse:
    """Stop a response that is not over; it answers when that is done, within one denoising step."""
    row = await _row(context, response_id, principal)
    await context.jobs.cancel(row.id, principal.tenant)
    row = await context.jobs.wait(row.id, CANCEL_SECONDS, principal.tenant)
    return JSONResponse(of_row(row._mapping), headers={"X-Job-Id": row.id})


@router.delete("/{response_id}")
async def delete_response(
    response_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Forget input and output of a response that is over; 409 while it runs."""
    row = await _row(context, response_id, principal)
    await context.jobs.purge(row.id, principal.tenant)
    return {"id": response_id, "object": "response", "deleted": True}


class ResponseStream(StayingStream):
    """The events of a response; who comes back to it only looks on."""

    def __init__(
        self,
        context: Context,
        job_id: str,
        tenant: str,
        *,
        after: int | None = None,
        staying: Stay | None = None,
        place: Place | None = None,
    ) -> None:
        self._job_id, self._tenant = job_id, tenant
        super().__init__(context, job_id, self._events(after), staying, place)

    async def _events(self, after: int | None) -> AsyncIterator[bytes]:
        first = await self._context.jobs.get(self._job_id, self._tenant)
        events = ResponseEvents(first._mapping, after)
        for event in events.start():
            yield _sent(event)
        async for item in follow(self._context, self._job_id, self._tenant):
            if item is None:
                yield KEEPALIVE_COMMENT
            elif isinstance(item, Row):
                self.over = True
                for event in _ending(events, item):
                    yield _sent(event)
            elif item[1] == "progress":
                for event in events.progress(item[2]):
                    yield _sent(event)
        if not self.over:
            yield _sent(events.error("overloaded", "the server is stopping; the response goes on"))


def _ending(events: ResponseEvents, row: Row[Any]) -> list[dict[str, Any]]:
    try:
        return events.finish(row._mapping)
    except Diverged:
        text = f"the job was run again and its text differs from what was sent; read {urls(row.id)['result']}"
        return [events.error("stream_diverged", text)]


def _sent(event: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(event, separators=(",", ":")), event=event["type"])
