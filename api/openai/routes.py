"""`/v1/chat/completions` and `/v1/completions`: jobs that the request waits for, or streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from sqlalchemy import Row
from starlette.types import Receive, Scope, Send

from api.auth import PrincipalDep, requires
from api.dependencies import Context, ContextDep, JsonBody, idempotency_key, is_automatic_retry
from api.errors import error_type, from_vdiff, problem
from api.events import follow
from api.openai.sse import ChunkStream, Diverged
from shared.errors import Overloaded, WaitTimeout
from shared.jobs.deadlines import Deadlines
from shared.jobs.responses import CHAT, COMPLETIONS
from shared.jobs.service import Accepted, Prepared, Submission, is_over
from shared.jobs.status import JobStatus, Priority
from shared.jobs.views import urls
from shared.keys.principal import Principal
from shared.keys.principal import Scope as KeyScope

router = APIRouter(tags=["openai"], dependencies=[requires(KeyScope.JOBS)])

CLIENT_GONE = 499
_STATUS = {"cancelled": 409, "expired": 409}  # of a job that ended otherwise; all else is 500
NO_RETRY = {"x-should-retry": "false"}  # the job had its own attempts


def _schema(required: str) -> dict[str, Any]:
    shape = {"type": "object", "required": ["model", required], "properties": {"model": {"type": "string"}}}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape}}}}


@router.post(CHAT, openapi_extra=_schema("messages"))
async def chat_completions(request: Request, body: JsonBody, context: ContextDep, principal: PrincipalDep) -> Response:
    """OpenAI's chat completions; diffusion parameters ride in `diffusion`."""
    return await serve(request, body, context, principal, CHAT)


@router.post(COMPLETIONS, openapi_extra=_schema("prompt"))
async def completions(request: Request, body: JsonBody, context: ContextDep, principal: PrincipalDep) -> Response:
    """OpenAI's completions; diffusion parameters ride in `diffusion`."""
    return await serve(request, body, context, principal, COMPLETIONS)


async def serve(request: Request, body: Any, context: Context, principal: Principal, endpoint: str) -> Response:
    """Accept the job, then wait for it or stream it."""
    submission = Submission(
        endpoint=endpoint,
        body=body,
        principal=principal,
        deadlines=Deadlines(retain_for=context.settings.retain_seconds),
        priority=Priority.INTERACTIVE,
        idempotency_key=idempotency_key(request),
        automatic_retry=is_automatic_retry(request),
        streaming=True,
    )
    prepared = await context.jobs.prepare(submission)
    context.waiter.register(prepared.id)
    try:
        accepted = await context.jobs.enqueue(prepared)
        # Whoever gave a key may come back for the answer; without one nobody can.
        mine = accepted.created and submission.idempotency_key is None
        if prepared.request.stream:
            return JobStream(context, prepared, accepted, cancel_when_left=mine)
        return await answer(request, context, accepted, principal.tenant, cancel_when_left=mine)
    finally:
        context.waiter.forget(prepared.id)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def leave(context: Context, job_id: str, tenant: str) -> None:
    """The client is gone: stop the job, unless somebody else here waits for it."""
    if not context.waiter.waits(job_id):
        await context.jobs.cancel(job_id, tenant)


async def answer(
    request: Request, context: Context, accepted: Accepted, tenant: str, *, cancel_when_left: bool
) -> Response:
    """The finished job's result or error; 504 with its URL when that takes too long."""
    job_id = accepted.id
    seconds = context.settings.sync_timeout_seconds
    ended = asyncio.ensure_future(context.jobs.wait(job_id, seconds, tenant))
    gone = asyncio.ensure_future(_disconnected(request))
    stopping = asyncio.ensure_future(context.stopping.wait())
    try:
        await asyncio.wait({ended, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done() and not ended.done()
        row = ended.result() if ended.done() else None
    finally:
        for task in (ended, gone, stopping):
            task.cancel()
        await asyncio.gather(ended, gone, stopping, return_exceptions=True)
    headers = {"X-Job-Id": job_id}
    if row is not None and is_over(row):
        return JSONResponse(row.result, headers=headers) if row.result else failure(request, row._mapping)
    if left:
        if cancel_when_left:
            context.spawn(leave(context, job_id, tenant))
        return Response(status_code=CLIENT_GONE, headers=headers)
    where = {**headers, "Location": urls(job_id)["self"]}
    if row is None:
        refused = from_vdiff(request, Overloaded(f"the server is stopping; the job goes on at {urls(job_id)['self']}"))
        refused.headers.update(where)
        return refused
    late = from_vdiff(
        request, WaitTimeout(f"not done after {seconds:g} s; the job goes on: GET {urls(job_id)['self']}?wait=60")
    )
    late.headers.update({**where, **NO_RETRY})
    return late


def _error_of(row: Mapping[Any, Any]) -> tuple[int, dict[str, Any]]:
    error = row["error"] or {"code": row["status"], "message": f"the job is {row['status']}", "param": None}
    status = _STATUS.get(row["status"], 500)
    body = {"message": error["message"], "type": error_type(status), "param": error["param"], "code": error["code"]}
    return status, body


def failure(request: Request, row: Mapping[Any, Any]) -> JSONResponse:
    """A job that did not succeed, as an error."""
    status, error = _error_of(row)
    return problem(
        status, error["message"], code=error["code"], param=error["param"], instance=request.url.path,
        headers={"X-Job-Id": row["id"], **NO_RETRY},
    )  # fmt: skip


def _data(value: Any) -> bytes:
    return format_sse_event(data_str=value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))


class JobStream(EventSourceResponse):
    """OpenAI's chunks, then `[DONE]`. A client that leaves early cancels the job, however early that is."""

    def __init__(self, context: Context, prepared: Prepared, accepted: Accepted, *, cancel_when_left: bool) -> None:
        self._context = context
        self._job_id = accepted.id
        self._tenant: str = prepared.values["tenant"]
        self._cancel_when_left = cancel_when_left
        self._over = False
        headers = {"X-Job-Id": accepted.id, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._chunks(prepared), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._over and self._cancel_when_left and not self._context.stopping.is_set():
                self._context.spawn(leave(self._context, self._job_id, self._tenant))

    async def _chunks(self, prepared: Prepared) -> AsyncIterator[bytes]:
        first = await self._context.jobs.get(self._job_id, self._tenant)
        params = prepared.values["params"]
        chunks = ChunkStream(
            first.endpoint, first.id, first.model, int(first.created_at.timestamp()), n=params["n"],
            include_usage=prepared.request.include_usage, visualize=params["diffusion"]["visualize"],
        )  # fmt: skip
        for chunk in chunks.start():
            yield _data(chunk)
        async for item in follow(self._context, self._job_id, self._tenant):
            if item is None:
                yield KEEPALIVE_COMMENT
            elif isinstance(item, Row):
                self._over = True
                for chunk in ending(chunks, item):
                    yield _data(chunk)
            elif item[1] == "progress":
                for chunk in chunks.progress(item[2]):
                    yield _data(chunk)
        if not self._over:
            yield _data({"error": {"message": "the server is stopping; the job goes on", "type": "server_error",
                                   "param": None, "code": "overloaded"}})  # fmt: skip
        yield _data("[DONE]")


def ending(chunks: ChunkStream, row: Row[Any]) -> list[dict[str, Any]]:
    """What closes the stream of a finished job."""
    if row.status != JobStatus.SUCCEEDED:
        return [{"error": _error_of(row._mapping)[1]}]
    try:
        return chunks.finish(row._mapping)
    except Diverged:
        message = f"the job was run again and its text differs from what was sent; read {urls(row.id)['result']}"
        return [{"error": {"message": message, "type": "server_error", "param": None, "code": "stream_diverged"}}]
