"""Native jobs: submit, look, wait, follow, cancel."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from sqlalchemy import Row

from api.auth import PrincipalDep, requires
from api.dependencies import (
    Context,
    ContextDep,
    JsonBody,
    idempotency_key,
    is_automatic_retry,
    json_body,
)
from api.errors import problem
from api.events import job_events
from api.openai.leaving import StayingStream
from api.paging import page_limit
from shared.errors import Conflict, InvalidParameter, MissingParameter, UnknownParameter, VDiffError
from shared.ids import is_id
from shared.jobs import deadlines, estimate, queries
from shared.jobs.fields import metadata_of
from shared.jobs.listing import JobFilter, read_page
from shared.jobs.responses import ENDPOINTS
from shared.jobs.service import Accepted, Prepared, Submission, is_over, refuse_purged
from shared.jobs.status import JobStatus, Priority
from shared.jobs.views import attempt_object, job_object, listed_object, urls
from shared.keys.principal import Principal, Scope
from shared.settings import Settings
from shared.webhooks.requests import JOB_FIELDS, job_webhook

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[requires(Scope.JOBS)])

MAX_CUSTOM_ID = 256
MAX_PAGE, DEFAULT_PAGE = 100, 20
RETRY_AFTER_SECONDS = 1
FIELDS = ("endpoint", "body", "priority", "metadata", "custom_id", "deadlines", "webhook")
_PREFER_WAIT = re.compile(r"(?:^|[,\s])wait=(\d{1,9})(?:$|[,;\s])")

_CREATE_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["endpoint", "body"],
                    "additionalProperties": False,
                    "properties": {
                        "endpoint": {"type": "string", "enum": list(ENDPOINTS)},
                        "body": {"type": "object", "description": "the endpoint's own body"},
                        "priority": {
                            "type": "string",
                            "enum": [p.value for p in Priority],
                            "default": "normal",
                        },
                        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                        "custom_id": {"type": "string", "maxLength": MAX_CUSTOM_ID},
                        "webhook": {
                            "type": "object",
                            "properties": {name: {} for name in JOB_FIELDS},
                        },
                        "deadlines": {
                            "type": "object",
                            "properties": {name: {} for name in deadlines.FIELDS},
                        },
                    },
                }
            }
        },
    }
}


_RETRY_SCHEMA = {
    "requestBody": {
        "required": False,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"deadlines": {"type": "object"}},
                }
            }
        },
    }
}


def submission_of(
    request: Request, body: Any, principal: Principal, settings: Settings
) -> Submission:
    """A native job's body, checked but for the inner one."""
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be an object", param="body")
    for name in body:
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise UnknownParameter(
                f"{name[:80]} is not a field of a job; known: {known}", param=name[:80]
            )
    for name in ("endpoint", "body"):
        if body.get(name) is None:
            raise MissingParameter(f"{name} is required", param=name)
    given = {k: v for k, v in body.items() if v is not None}
    priority = given.get("priority", Priority.NORMAL.value)
    if priority not in list(Priority):
        raise InvalidParameter(f"priority must be one of {', '.join(Priority)}", param="priority")
    custom_id = given.get("custom_id")
    if custom_id is not None and not (
        isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_CUSTOM_ID
    ):
        raise InvalidParameter(
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", param="custom_id"
        )
    return Submission(
        endpoint=given["endpoint"],
        body=given["body"],
        principal=principal,
        priority=Priority(priority),
        custom_id=custom_id,
        metadata=metadata_of(given.get("metadata", {}), "metadata"),
        deadlines=deadlines.deadlines_of(
            given.get("deadlines", {}), default_retain_seconds=settings.default_retain_seconds
        ),
        webhook=job_webhook(given.get("webhook"), allow_private=settings.webhook_allow_private),
        idempotency_key=idempotency_key(request),
        automatic_retry=is_automatic_retry(request),
    )


async def show(context: Context, row: Row[Any]) -> dict[str, Any]:
    """The job object, with its place in the queue and an estimate while it is not over."""
    position = eta = None
    if not is_over(row):
        async with context.database.read() as session:
            if row.status == JobStatus.QUEUED:
                position = await estimate.queue_position(session, row._mapping)
            eta = await estimate.eta_seconds(
                session, row._mapping, position, context.settings.worker_stale_seconds
            )
    span = None if eta is None else (await context.forecasts.calibration(row.model)).range_of(eta)
    original = await context.jobs.original_result(row)
    return job_object(
        row._mapping,
        queue_position=position,
        eta_seconds=eta,
        eta_range_seconds=span,
        original=original,
    )


async def gone(context: Context, request: Request, row: Row[Any]) -> JSONResponse:
    """410 for a purged job, with what the ledger still knows of it."""
    answer = problem(
        410,
        f"input and output of {row.id} were purged",
        code="job_purged",
        param=None,
        instance=request.url.path,
        headers={"X-Job-Id": row.id},
        more={"job": await show(context, row)},
    )
    return answer


def preferred_wait(request: Request, longest: float) -> float | None:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most `longest`; None when it does not say."""
    found = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return None if found is None else min(float(found.group(1)), longest)


def wait_seconds(value: str | None, longest: float) -> float:
    """The query's `wait`. Raises InvalidParameter."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= longest:  # also refuses NaN
        raise InvalidParameter(f"wait must be from 0 to {longest:g} seconds", param="wait")
    return seconds


@router.post("", status_code=202, openapi_extra=_CREATE_SCHEMA)
async def create(
    request: Request, body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> JSONResponse:
    """Accept a job: 202 with its row, or 200 with the result when `Prefer: wait=N` was long enough.

    With an `Idempotency-Key` the same request gives the same job for 24 hours; another body under
    the key is 422.
    """
    submission = submission_of(request, body, principal, context.settings)
    try:
        prepared = await context.jobs.prepare(submission)
    except VDiffError:
        if (found := await context.jobs.made_before(submission)) is None:
            raise
        with waiting_place(
            context, principal, preferred_wait(request, context.settings.max_wait_seconds)
        ):
            return await accepted_as(request, context, Accepted(found, created=False), principal)
    return await accept(request, context, prepared, principal)


async def accept(
    request: Request, context: Context, prepared: Prepared, principal: Principal
) -> JSONResponse:
    """Store the job and answer with it: at once, or when it is over for `Prefer: wait`."""
    with waiting_place(
        context, principal, preferred_wait(request, context.settings.max_wait_seconds)
    ):
        accepted = await context.jobs.enqueue(prepared)
        return await accepted_as(request, context, accepted, principal)


def waiting_place(
    context: Context, principal: Principal, seconds: float | None
) -> AbstractContextManager[object]:
    """Hold a place for a request that waits so long; none for one that does not. Raises
    TooManyRequests.
    """
    return context.followers.enter(principal) if seconds else nullcontext()


async def accepted_as(
    request: Request, context: Context, accepted: Accepted, principal: Principal
) -> JSONResponse:
    """The answer for a job that is stored."""
    request.state.job_id = accepted.id  # an error from here on tells it too
    seconds = preferred_wait(request, context.settings.max_wait_seconds)
    row = await context.jobs.wait(accepted.id, seconds or 0.0, principal.tenant)
    over = is_over(row)
    headers = {"Location": urls(row.id)["self"], "X-Job-Id": row.id}
    if seconds is not None:
        headers["Preference-Applied"] = f"wait={seconds:.0f}"
    if not over:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    shown = await show(context, row)
    if accepted.created and not over:
        context.spawn(context.forecasts.store(row.id, shown["eta_seconds"]))
    return JSONResponse(shown, 200 if over and seconds is not None else 202, headers)


def _cursor(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def _cursor_id(cursor: str) -> str:
    try:
        last_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, UnicodeError, ValueError):
        last_id = ""
    if not is_id(last_id, "job"):
        raise InvalidParameter("cursor must be one that a list gave", param="cursor")
    return last_id


def _moment(value: str) -> datetime:
    try:
        seconds: float | str = float(value)
    except ValueError:
        seconds = value
    return deadlines.moment_of(seconds, "created_after")


def _no_nul(params: list[tuple[str, str]]) -> None:
    for name, value in params:
        if "\x00" in name or "\x00" in value:
            raise InvalidParameter(
                f"{name!r} has a NUL character", param=name.replace("\x00", "")[:80] or "query"
            )


@router.get("")
async def list_jobs(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    status: str | None = None,
    model: str | None = None,
    batch_id: str | None = None,
    created_after: str | None = None,
    limit: str | None = None,
    cursor: str | None = None,
) -> dict[str, Any]:
    """Jobs, newest first, without results. `metadata[key]=value` filters; `next_cursor` goes on
    where the page ends.

    A page may have fewer jobs than `limit`, even none, while `has_more` is true.
    """
    given = request.query_params.multi_items()
    _no_nul(given)
    metadata = {}
    for name, value in given:
        if name.startswith("metadata[") and name.endswith("]"):
            metadata[name[9:-1]] = value
        elif name not in ("status", "model", "batch_id", "created_after", "limit", "cursor"):
            raise UnknownParameter(f"{name[:80]} is not a parameter of this list", param=name[:80])
    if status is not None and status not in list(JobStatus):
        raise InvalidParameter(f"status must be one of {', '.join(JobStatus)}", param="status")
    size = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)
    wanted = JobFilter(
        principal.tenant,
        status=status,
        model=model,
        batch_id=batch_id,
        metadata=metadata,
        created_after=None if created_after is None else _moment(created_after),
        before_id=None if cursor is None else _cursor_id(cursor),
    )
    page = await read_page(context.lists, wanted, size)
    return {
        "object": "list",
        "data": [listed_object(row._mapping) for row in page.rows],
        "has_more": page.next_id is not None,
        "next_cursor": None if page.next_id is None else _cursor(page.next_id),
    }


@router.get("/{job_id}")
async def get_job(
    request: Request,
    job_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    wait: str | None = None,
) -> Response:
    """The job; with `wait=30` the answer comes when the job is over, or after 30 seconds. Knows
    If-None-Match.
    """
    seconds = wait_seconds(wait, context.settings.max_wait_seconds)
    with waiting_place(context, principal, seconds):
        row = await context.jobs.wait(job_id, seconds, principal.tenant)
    if row.purged_at is not None:
        return await gone(context, request, row)
    shown = await show(context, row)
    etag = f'"{hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:32]}"'
    headers = {"ETag": etag, "X-Job-Id": row.id}
    wanted = [
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("if-none-match", "").split(",")
    ]
    if etag in wanted or "*" in wanted:
        return Response(status_code=304, headers=headers)
    if not is_over(row):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return JSONResponse(shown, headers=headers)


def _is_event_id(text: str) -> bool:
    """Return whether it is an id of a Redis stream: two numbers of 64 bits."""
    return bool(re.fullmatch(r"[0-9]{1,20}-[0-9]{1,20}", text)) and all(
        int(n) < 2**64 for n in text.split("-")
    )


@router.get("/{job_id}/events")
async def events(
    request: Request, job_id: str, context: ContextDep, principal: PrincipalDep
) -> EventSourceResponse:
    """Server-sent events: queued, started, progress, denoise, done. `Last-Event-ID` resumes; after
    ten minutes the stream ends, so that the key is looked at again when the client comes back with
    the last id.
    """
    row = await context.jobs.get(job_id, principal.tenant)
    refuse_purged(row)
    last = request.headers.get("last-event-id", "")
    if last and not _is_event_id(last):
        raise InvalidParameter(
            "Last-Event-ID must be the id of an event of this stream", param="Last-Event-ID"
        )
    place = context.followers.enter(principal)
    return StayingStream(context, row.id, job_events(context, row, last or None), None, place)


@router.get("/{job_id}/input")
async def job_input(job_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Return the job's request body as it was sent; 410 once it is purged."""
    return {
        "object": "job.input",
        "job_id": job_id,
        "body": await context.jobs.body(job_id, principal.tenant),
    }


@router.get("/{job_id}/result")
async def result(
    request: Request, job_id: str, context: ContextDep, principal: PrincipalDep
) -> JSONResponse:
    """The response object that the job's endpoint would have given; 409 unless the job succeeded."""
    row = await context.jobs.get(job_id, principal.tenant)
    if row.purged_at is not None:
        return await gone(context, request, row)
    if row.status == JobStatus.SUCCEEDED:
        return JSONResponse(row.result, headers={"X-Job-Id": row.id})
    if not is_over(row):
        raise Conflict(
            f"the job is {row.status}; wait for it with {urls(row.id)['self']}?wait=30",
            code="job_not_done",
        )
    error = row.error or {}
    message = f"the job is {row.status}: {error.get('message', 'no result')}"
    return problem(
        409,
        message,
        code=error.get("code", "no_result"),
        param=error.get("param"),
        instance=request.url.path,
        headers={"X-Job-Id": row.id},
    )


@router.get("/{job_id}/attempts")
async def attempts(job_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Every execution of the job, oldest first."""
    await context.jobs.get(job_id, principal.tenant)
    async with context.database.read() as session:
        rows = (await session.execute(queries.attempts(job_id))).all()
    return {
        "object": "list",
        "data": [attempt_object(row._mapping) for row in rows],
        "has_more": False,
    }


@router.post("/{job_id}/cancel", status_code=202)
async def cancel(job_id: str, context: ContextDep, principal: PrincipalDep) -> JSONResponse:
    """Stop the job between two denoising steps: 202 while it still runs, 200 with the job once it
    is over.
    """
    row = await context.jobs.cancel(job_id, principal.tenant)
    return JSONResponse(
        await show(context, row), 200 if is_over(row) else 202, {"X-Job-Id": row.id}
    )


@router.post("/estimate", openapi_extra=_CREATE_SCHEMA)
async def estimate_job(
    request: Request, body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Estimate a job's tokens, model calls and seconds. Checks it as `POST /v1/jobs` does and
    accepts nothing.
    """
    prepared = await context.jobs.prepare(submission_of(request, body, principal, context.settings))
    return await estimate.estimate_object(
        context.database, prepared.values, context.settings.worker_stale_seconds
    )


@router.post("/{job_id}/retry", status_code=202, openapi_extra=_RETRY_SCHEMA)
async def retry(
    request: Request, job_id: str, context: ContextDep, principal: PrincipalDep
) -> JSONResponse:
    """Another life for a job that failed, was cancelled or expired; 409 for one that succeeded or
    is not over.

    The body may give new `deadlines`; without them, moments that have passed are dropped.
    """
    given = await json_body(request) if await request.body() else {}
    if not isinstance(given, dict):
        raise InvalidParameter("the body must be an object", param="body")
    for name in given:
        if name != "deadlines":
            raise UnknownParameter(
                f"{name[:80]} is not a field of a retry; known: deadlines", param=name[:80]
            )
    fresh = None
    if given.get("deadlines") is not None:
        fresh = deadlines.deadlines_of(
            given["deadlines"], default_retain_seconds=context.settings.default_retain_seconds
        )
        fresh.refuse_passed(datetime.now(UTC))
    row = await context.jobs.retry(job_id, principal, fresh)
    headers = {
        "Location": urls(row.id)["self"],
        "X-Job-Id": row.id,
        "Retry-After": str(RETRY_AFTER_SECONDS),
    }
    return JSONResponse(await show(context, row), 202, headers)


@router.post("/{job_id}/replay", status_code=202)
async def replay(
    request: Request, job_id: str, context: ContextDep, principal: PrincipalDep
) -> JSONResponse:
    """A new job with the same prompt, parameters, seed and model revision; when done it says
    whether the text is the same.
    """
    prepared = await context.jobs.prepare_replay(
        job_id,
        principal,
        idempotency_key=idempotency_key(request),
        automatic_retry=is_automatic_retry(request),
    )
    return await accept(request, context, prepared, principal)


@router.delete("/{job_id}")
async def delete(job_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Purge input and output of a job that is over; the ledger row stays, and asking for the job is
    410 from then on.
    """
    await context.jobs.purge(job_id, principal.tenant)
    return {"id": job_id, "object": "job.deleted", "deleted": True}
