"""`/v1/chat/completions` and `/v1/completions`, and beside them `/v1/infill` and
`/v1/loglikelihood`: jobs that the request waits for; the first two also stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy import Row

from api.auth import CallerDep, count_request, rate_line, requires
from api.backpressure import ClientLeft, Visit, disconnected
from api.dependencies import Context, ContextDep, JsonBody, idempotency_key, is_automatic_retry
from api.errors import error_type, from_vdiff, problem
from api.events import follow
from api.followers import Place
from api.openai.leaving import Stay, StayingStream, stay
from api.openai.sse import ChunkStream, Diverged
from shared.errors import Overloaded, WaitTimeout
from shared.jobs.deadlines import Deadlines
from shared.jobs.responses import CHAT, COMPLETIONS, INFILL, LOGLIKELIHOOD
from shared.jobs.service import Prepared, Submission, is_over, refuse_purged
from shared.jobs.status import JobStatus, Priority
from shared.jobs.views import urls
from shared.keys.principal import Principal
from shared.keys.principal import Scope as KeyScope

router = APIRouter(
    tags=["openai"], dependencies=[requires(KeyScope.JOBS, counted=False)]
)  # `serve` counts

CLIENT_GONE = 499
_STATUS = {"cancelled": 409, "expired": 409}  # of a job that ended otherwise; all else is 500
NO_RETRY = {"x-should-retry": "false"}  # the job had its own attempts


Reply = Callable[[Request, Context, Prepared, Stay, Visit], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Way:
    """Options of an endpoint whose jobs are run or answered differently from chat's."""

    reply: Reply
    priority: Priority
    retain_seconds: float | None
    stays: bool  # the job goes on when the client leaves


def body_schema(*required: str) -> dict[str, Any]:
    """OpenAPI's words for a body that is checked in `shared.jobs`."""
    shape = {
        "type": "object",
        "required": ["model", *required],
        "properties": {"model": {"type": "string"}},
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape}}}}


@router.post(CHAT, openapi_extra=body_schema("messages"))
async def chat_completions(
    request: Request, body: JsonBody, context: ContextDep, principal: CallerDep
) -> Response:
    """OpenAI's chat completions; diffusion parameters ride in `diffusion`."""
    return await serve(request, body, context, principal, CHAT)


@router.post(COMPLETIONS, openapi_extra=body_schema("prompt"))
async def completions(
    request: Request, body: JsonBody, context: ContextDep, principal: CallerDep
) -> Response:
    """OpenAI's completions; diffusion parameters ride in `diffusion`."""
    return await serve(request, body, context, principal, COMPLETIONS)


@router.post(INFILL, openapi_extra=body_schema("parts"))
async def infill(
    request: Request, body: JsonBody, context: ContextDep, principal: CallerDep
) -> Response:
    """A text with holes at any place, filled with all that stands around them in view."""
    return await serve(request, body, context, principal, INFILL)


@router.post(LOGLIKELIHOOD, openapi_extra=body_schema())
async def loglikelihood(
    request: Request, body: JsonBody, context: ContextDep, principal: CallerDep
) -> Response:
    """Score how likely a continuation is after a context, or many such pairs."""
    return await serve(request, body, context, principal, LOGLIKELIHOOD)


async def _reply(
    request: Request, context: Context, prepared: Prepared, staying: Stay, visit: Visit
) -> Response:
    if prepared.request.stream:
        return JobStream(prepared, staying)
    return await answer(request, context, staying, visit.remaining_seconds)


async def serve(
    request: Request,
    body: Any,
    context: Context,
    principal: Principal,
    endpoint: str,
    way: Way | None = None,
) -> Response:
    """Accept the job, then wait for it or stream it. Beyond a limit the request waits for its turn
    first.
    """
    way = way or Way(
        _reply, Priority.INTERACTIVE, context.settings.default_retain_seconds, stays=False
    )
    size = len(await request.body())
    visit = Visit(
        request, context.stopping, longest=context.settings.sync_timeout_seconds, size=size
    )
    room = context.waiting_room
    place: Place | None = context.followers.enter(principal)
    try:
        await room.admit(
            rate_line(principal), visit, lambda: count_request(request, context, principal)
        )
        submission = Submission(
            endpoint=endpoint,
            body=body,
            principal=principal,
            deadlines=Deadlines(retain_for=way.retain_seconds),
            priority=way.priority,
            idempotency_key=idempotency_key(request),
            automatic_retry=is_automatic_retry(request),
            streaming=True,
        )
        prepared = await context.jobs.prepare(submission)
        waited_for = [prepared.id]
        context.waiter.register(prepared.id)
        try:
            line = f"queued {principal.tenant} {principal.key_id}"
            accepted = await room.admit(line, visit, lambda: context.jobs.enqueue(prepared))
            request.state.job_id = accepted.id  # an error from here on tells it too
            if not accepted.created:
                waited_for.append(accepted.id)
                context.waiter.register(accepted.id)
            staying = stay(
                request,
                context,
                job_id=accepted.id,
                tenant=principal.tenant,
                created=accepted.created,
                keyed=way.stays or submission.idempotency_key is not None,
            )
            reply = await way.reply(request, context, prepared, staying, visit)
            if isinstance(reply, StayingStream):
                reply.place, place = place, None  # the stream leaves it
            return reply
        finally:
            for job_id in waited_for:
                context.waiter.forget(job_id)
    except ClientLeft:
        return Response(status_code=CLIENT_GONE)
    finally:
        if place is not None:
            place.leave()


async def answer(request: Request, context: Context, staying: Stay, seconds: float) -> Response:
    """The finished job's result or error; 504 with its URL when that takes too long."""
    job_id = staying.job_id
    ended = asyncio.ensure_future(context.jobs.wait(job_id, seconds, staying.tenant))
    gone = asyncio.ensure_future(disconnected(request))
    stopping = asyncio.ensure_future(context.stopping.wait())
    try:
        await asyncio.wait({ended, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        client_left = gone.done()
        left = client_left and not ended.done()
        row = ended.result() if ended.done() else None
    finally:
        for task in (ended, gone, stopping):
            task.cancel()
        await asyncio.gather(ended, gone, stopping, return_exceptions=True)
    headers = {"X-Job-Id": job_id}
    if row is not None and is_over(row):
        if client_left:
            staying.leave()
        refuse_purged(row)  # it had less to live than its answer took to be read
        return (
            JSONResponse(row.result, headers=headers)
            if row.result
            else failure(request, row._mapping)
        )
    if left:
        staying.leave()
        return Response(status_code=CLIENT_GONE, headers=headers)
    where = {**headers, "Location": urls(job_id)["self"]}
    if row is None:
        refused = from_vdiff(
            request,
            Overloaded(f"the server is stopping; the job goes on at {urls(job_id)['self']}"),
        )
        refused.headers.update(where)
        return refused
    most = context.settings.sync_timeout_seconds
    late = from_vdiff(
        request,
        WaitTimeout(
            f"not done after {most:g} s; the job goes on: GET {urls(job_id)['self']}?wait=60"
        ),
    )
    late.headers.update({**where, **NO_RETRY})
    return late


def _error_of(row: Mapping[Any, Any]) -> tuple[int, dict[str, Any]]:
    error = row["error"] or {
        "code": row["status"],
        "message": f"the job is {row['status']}",
        "param": None,
    }
    status = _STATUS.get(row["status"], 500)
    body = {
        "message": error["message"],
        "type": error_type(status),
        "param": error["param"],
        "code": error["code"],
    }
    return status, body


def failure(request: Request, row: Mapping[Any, Any]) -> JSONResponse:
    """A job that did not succeed, as an error."""
    status, error = _error_of(row)
    return problem(
        status,
        error["message"],
        code=error["code"],
        param=error["param"],
        instance=request.url.path,
        headers={"X-Job-Id": row["id"], **NO_RETRY},
    )


def _data(value: Any) -> bytes:
    return format_sse_event(
        data_str=value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    )


class JobStream(StayingStream):
    """OpenAI's chunks, then `[DONE]`."""

    def __init__(self, prepared: Prepared, staying: Stay) -> None:
        self._job_id, self._tenant = staying.job_id, staying.tenant
        super().__init__(staying.context, staying.job_id, self._chunks(prepared), staying)

    async def _chunks(self, prepared: Prepared) -> AsyncIterator[bytes]:
        first = await self._context.jobs.get(self._job_id, self._tenant)
        params = prepared.values["params"]
        chunks = ChunkStream(
            first.endpoint,
            first.id,
            first.model,
            int(first.created_at.timestamp()),
            n=params["n"],
            include_usage=prepared.request.include_usage,
            visualize=params["diffusion"]["visualize"],
        )
        for chunk in chunks.start():
            yield _data(chunk)
        async for item in follow(self._context, self._job_id, self._tenant):
            if item is None:
                yield KEEPALIVE_COMMENT
            elif isinstance(item, Row):
                self.over = True
                for chunk in ending(chunks, item):
                    yield _data(chunk)
            elif item[1] == "progress":
                for chunk in chunks.progress(item[2]):
                    yield _data(chunk)
        if not self.over:
            yield _data(
                {
                    "error": {
                        "message": "the server is stopping; the job goes on",
                        "type": "server_error",
                        "param": None,
                        "code": "overloaded",
                    }
                }
            )
        yield _data("[DONE]")


def ending(chunks: ChunkStream, row: Row[Any]) -> list[dict[str, Any]]:
    """Return the events that close the stream of a finished job."""
    if row.status != JobStatus.SUCCEEDED:
        return [{"error": _error_of(row._mapping)[1]}]
    try:
        return chunks.finish(row._mapping)
    except Diverged:
        message = f"the job was run again and its text differs from what was sent; read {urls(row.id)['result']}"
        return [
            {
                "error": {
                    "message": message,
                    "type": "server_error",
                    "param": None,
                    "code": "stream_diverged",
                }
            }
        ]
