"""Webhook endpoints, their secrets, and what became of each delivery."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from sqlalchemy import Row

from api.auth import PrincipalDep, requires
from api.dependencies import Context, ContextDep, JsonBody, optional_body
from api.followers import FollowingStream
from shared import checks
from shared.db.tables.webhooks import DELIVERY_STATES
from shared.errors import Conflict, Forbidden, InvalidParameter, MissingParameter, NotFound
from shared.ids import is_id, new_id
from shared.jobs.deadlines import moment_of
from shared.keys.principal import Principal, Scope
from shared.links import link
from shared.webhooks import repository
from shared.webhooks.events import DEFAULT_TYPES, TEST_TYPE, TYPES
from shared.webhooks.requests import (
    ENDPOINT_FIELDS,
    delivery_object,
    endpoint_object,
    endpoint_values,
)
from shared.webhooks.secrets import new_secret

router = APIRouter(prefix="/v1", tags=["webhooks"], dependencies=[requires(Scope.WEBHOOKS)])
# Whoever may submit jobs may name a receiver for one, and needs what signs it.
secrets_router = APIRouter(
    prefix="/v1", tags=["webhooks"], dependencies=[requires(Scope.JOBS, Scope.WEBHOOKS)]
)

REDELIVERED_MAX = 100_000  # by one request
ENDPOINTS_MAX = 100  # per tenant
DEFAULT_GRACE_SECONDS = 24 * 3600
GRACE_SECONDS_MAX = 30 * 86_400
DEFAULT_PAGE, MAX_PAGE = 20, 100

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
_BODY = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {} for name in ENDPOINT_FIELDS},
                }
            }
        }
    }
}


def _check_inline(values: Mapping[str, Any], principal: Principal) -> None:
    """Refuse to switch on inline results for a caller that may not read results. Raises Forbidden."""
    if values.get("inline_result") and not principal.reads_results:
        raise Forbidden(
            "inline_result sends the results of all jobs of the tenant; this API key lacks the scope 'jobs'",
            param="inline_result",
        )


async def _endpoint(context: Context, endpoint_id: str, principal: Principal) -> Row[Any]:
    if is_id(endpoint_id, "we"):
        async with context.database.read() as session:
            statement = repository.get_endpoint(endpoint_id, principal.tenant)
            row: Row[Any] | None = (await session.execute(statement)).one_or_none()
        if row is not None:
            return row
    raise NotFound(f"no webhook endpoint {endpoint_id[:80]!r}", param="endpoint_id")


@router.get("/webhook_event_types")
async def event_types() -> dict[str, Any]:
    """List the event types. An endpoint without `events` gets those that are marked as default."""
    data = [
        {"type": name, "description": text, "default": name in DEFAULT_TYPES}
        for name, text in TYPES.items()
    ]
    return {"object": "list", "data": data}


@secrets_router.get("/webhook_secret")
async def own_secret(context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Return the secret that signs webhooks named by single jobs: the key's own, or the tenant's
    where no key is used.
    """
    async with context.database.write() as session:
        if principal.key_id is not None:
            found = await session.execute(repository.secret_of_key(principal.key_id))
        else:
            await session.execute(
                repository.ensure_secret(principal.tenant, context.vault.seal(new_secret()))
            )
            found = await session.execute(repository.secret_of_tenant(principal.tenant))
        return {"object": "webhook_secret", "secret": context.vault.unseal(found.scalar_one())}


@secrets_router.post("/webhook_secret/rotate")
async def rotate_own_secret(
    request: Request, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Another secret for the webhooks that single jobs name; the former one signs too for
    `grace_seconds` (a day).
    """
    given = await optional_body(request, ("grace_seconds",))
    grace = checks.number(
        given.get("grace_seconds", DEFAULT_GRACE_SECONDS), "grace_seconds", 0, GRACE_SECONDS_MAX
    )
    secret = new_secret()
    sealed = context.vault.seal(secret)
    async with context.database.write() as session:
        if principal.key_id is not None:
            statement = repository.rotate_secret_of_key(
                principal.key_id, sealed, grace_seconds=grace
            )
        else:
            await session.execute(repository.ensure_secret(principal.tenant, sealed))
            statement = repository.rotate_secret_of_tenant(
                principal.tenant, sealed, grace_seconds=grace
            )
        (await session.execute(statement)).scalar_one()
    return {"object": "webhook_secret", "secret": secret}


@router.post("/webhook_endpoints", status_code=201, openapi_extra=_BODY)
async def create(body: JsonBody, context: ContextDep, principal: PrincipalDep) -> JSONResponse:
    """Register an endpoint; the answer holds its secret, which is not shown again."""
    values = endpoint_values(
        body, allow_private=context.settings.webhook_allow_private, partial=False
    )
    _check_inline(values, principal)
    endpoint_id, secret = new_id("we"), new_secret()
    async with context.database.write() as session:
        count = (await session.execute(repository.count_endpoints(principal.tenant))).scalar_one()
        if count >= ENDPOINTS_MAX:
            raise Conflict(f"a tenant has at most {ENDPOINTS_MAX} webhook endpoints")
        await session.execute(
            repository.create_endpoint(
                {
                    **values,
                    "id": endpoint_id,
                    "tenant": principal.tenant,
                    "secret": context.vault.seal(secret),
                }
            )
        )
    row = await _endpoint(context, endpoint_id, principal)
    shown = endpoint_object(row._mapping, secret=secret)
    return JSONResponse(shown, 201, {"Location": link(f"/v1/webhook_endpoints/{endpoint_id}")})


@router.get("/webhook_endpoints")
async def list_endpoints(
    context: ContextDep,
    principal: PrincipalDep,
    limit: Limit = DEFAULT_PAGE,
    cursor: str | None = None,
) -> dict[str, Any]:
    if cursor is not None and not is_id(cursor, "we"):
        raise InvalidParameter("cursor must be one that a list gave", param="cursor")
    async with context.lists.read() as session:
        statement = repository.list_endpoints(principal.tenant, after=cursor, limit=limit)
        rows = (await session.execute(statement)).all()
    page, more = rows[:limit], len(rows) > limit
    return {
        "object": "list",
        "data": [endpoint_object(row._mapping) for row in page],
        "has_more": more,
        "next_cursor": page[-1].id if more else None,
    }


@router.get("/webhook_endpoints/{endpoint_id}")
async def get(endpoint_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    return endpoint_object((await _endpoint(context, endpoint_id, principal))._mapping)


@router.post("/webhook_endpoints/{endpoint_id}", openapi_extra=_BODY)
async def change(
    endpoint_id: str, body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Change the given fields; `enabled: true` brings a disabled endpoint back.

    Inline results, and the URL of an endpoint that receives them, need the scope `jobs` too.
    """
    await _endpoint(context, endpoint_id, principal)
    values = endpoint_values(
        body, allow_private=context.settings.webhook_allow_private, partial=True
    )
    _check_inline(values, principal)
    if values:
        statement = repository.update_endpoint(
            endpoint_id, principal.tenant, values, reads_results=principal.reads_results
        )
        async with context.database.write() as session:
            changed = (await session.execute(statement)).one_or_none()
        if changed is None:
            await _endpoint(context, endpoint_id, principal)  # it may be gone
            raise Forbidden(
                "the endpoint receives results (inline_result), so its url needs the scope 'jobs', "
                "which this API key lacks; switch inline_result off in the same request, or use another key",
                param="url",
            )
    return endpoint_object((await _endpoint(context, endpoint_id, principal))._mapping)


@router.delete("/webhook_endpoints/{endpoint_id}")
async def delete(endpoint_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Remove the endpoint; its deliveries go soon after. What is on its way may still arrive."""
    await _endpoint(context, endpoint_id, principal)
    async with context.database.write() as session:
        await session.execute(repository.delete_endpoint(endpoint_id, principal.tenant))
    return {"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate(
    request: Request, endpoint_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Another secret; for `grace_seconds` (a day) both sign, so that no event is lost while the
    receiver changes over.
    """
    await _endpoint(context, endpoint_id, principal)
    grace = (await optional_body(request, ("grace_seconds",))).get(
        "grace_seconds", DEFAULT_GRACE_SECONDS
    )
    grace = checks.number(grace, "grace_seconds", 0, GRACE_SECONDS_MAX)
    secret = new_secret()
    async with context.database.write() as session:
        sealed = context.vault.seal(secret)
        statement = repository.rotate_secret(
            endpoint_id, principal.tenant, sealed, grace_seconds=grace
        )
        await session.execute(statement)
    return endpoint_object(
        (await _endpoint(context, endpoint_id, principal))._mapping, secret=secret
    )


@router.post("/webhook_endpoints/{endpoint_id}/test", status_code=202)
async def test(endpoint_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Send a `webhook.test` event, which concerns no job; ask for its delivery to see what came of
    it.
    """
    row = await _endpoint(context, endpoint_id, principal)
    if not row.enabled:
        raise Conflict("the endpoint is disabled; enable it first")
    event_id = new_id("evt")
    async with context.database.write() as session:
        event, delivery = repository.add_test(event_id, endpoint_id, principal.tenant, TEST_TYPE)
        await session.execute(event)
        delivery_id = (await session.execute(delivery)).scalar_one()
    return {"object": "webhook_test", "event_id": event_id, "delivery_id": str(delivery_id)}


def _job_id(given: str | None) -> None:
    if given is not None and not is_id(given, "job"):
        raise InvalidParameter("job_id must be the id of a job", param="job_id")


async def _deliveries(
    context: Context, principal: Principal, limit: int, cursor: str | None, **only: Any
) -> Any:
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise InvalidParameter("cursor must be one that a list gave", param="cursor")
    if only.get("status") is not None and only["status"] not in DELIVERY_STATES:
        raise InvalidParameter(
            f"status must be one of {', '.join(DELIVERY_STATES)}", param="status"
        )
    before = None if cursor is None else int(cursor)
    async with context.lists.read() as session:
        statement = repository.list_deliveries(principal.tenant, before=before, limit=limit, **only)
        rows = (await session.execute(statement)).all()
        page = rows[:limit]
        attempts: dict[int, list[Any]] = {row.id: [] for row in page}
        for attempt in await session.execute(repository.attempts_of(list(attempts))):
            attempts[attempt.delivery_id].append(attempt._mapping)
    more = len(rows) > limit
    return {
        "object": "list",
        "data": [delivery_object(row._mapping, attempts[row.id]) for row in page],
        "has_more": more,
        "next_cursor": str(page[-1].id) if more else None,
    }


@router.get("/webhook_endpoints/{endpoint_id}/deliveries")
async def deliveries_of_endpoint(
    endpoint_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    status: str | None = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: str | None = None,
) -> Any:
    """List sent and pending deliveries with every attempt, newest first."""
    await _endpoint(context, endpoint_id, principal)
    return await _deliveries(
        context, principal, limit, cursor, endpoint_id=endpoint_id, job_id=None, status=status
    )


@router.get("/deliveries")
async def deliveries(
    context: ContextDep,
    principal: PrincipalDep,
    job_id: str | None = None,
    status: str | None = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: str | None = None,
) -> Any:
    """Deliveries to all receivers, those that single jobs named too; `job_id` filters."""
    _job_id(job_id)
    return await _deliveries(
        context, principal, limit, cursor, endpoint_id=None, job_id=job_id, status=status
    )


@router.get("/deliveries/events")
async def delivery_events(
    context: ContextDep,
    principal: PrincipalDep,
    job_id: str | None = None,
    endpoint_id: str | None = None,
) -> EventSourceResponse:
    """Server-sent events: `deliveries`, the newest ones of a job or of an endpoint, whenever one of
    them changed.
    """
    if (job_id is None) == (endpoint_id is None):
        raise MissingParameter("give one of job_id and endpoint_id", param="job_id")
    _job_id(job_id)
    if endpoint_id is not None:
        await _endpoint(context, endpoint_id, principal)

    async def read() -> Any:
        only = {"job_id": job_id, "endpoint_id": endpoint_id, "status": None}
        return await _deliveries(context, principal, DEFAULT_PAGE, None, **only)

    events = context.changes.follow("deliveries", (principal.tenant, job_id, endpoint_id), read)
    return FollowingStream(events, context.followers.enter(principal))


@router.post("/deliveries/{delivery_id}/redeliver", status_code=202)
async def redeliver(
    delivery_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Send it again, whatever became of it, under the same event id and with the whole schedule."""
    number = (
        int(delivery_id)
        if delivery_id.isascii() and delivery_id.isdigit() and len(delivery_id) < 19
        else -1
    )
    async with context.database.write() as session:
        found = (
            await session.execute(repository.redeliver(number, principal.tenant))
        ).one_or_none()
    if found is None:
        raise NotFound(f"no delivery {delivery_id[:80]!r}", param="delivery_id")
    return {"object": "webhook_redelivery", "count": 1}


@router.post("/webhook_endpoints/{endpoint_id}/redeliver", status_code=202)
async def redeliver_range(
    request: Request, endpoint_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Send again what this endpoint should have got from `since` (to `until`): what failed or was
    discarded, or `statuses`.

    One request does at most 100,000; `has_more` says that the same request does more.
    """
    row = await _endpoint(context, endpoint_id, principal)
    given = await optional_body(request, ("since", "until", "statuses"))
    if "since" not in given:
        raise MissingParameter("since is required", param="since")
    since = moment_of(given["since"], "since")
    until: datetime | None = moment_of(given["until"], "until") if "until" in given else None
    statuses = given.get("statuses", ["failed", "discarded"])
    known = [s for s in DELIVERY_STATES if s != "pending"]
    if not isinstance(statuses, list) or not statuses or any(s not in known for s in statuses):
        raise InvalidParameter(
            f"statuses must be a list of some of {', '.join(known)}", param="statuses"
        )
    if not row.enabled:
        raise Conflict("the endpoint is disabled; enable it first")
    count, last = 0, 0
    while count < REDELIVERED_MAX:
        async with context.database.write() as session:
            statement = repository.redeliver_range(
                endpoint_id,
                principal.tenant,
                since=since,
                until=until,
                statuses=statuses,
                after_id=last,
            )
            moved = (await session.execute(statement)).scalars().all()
        count += len(moved)
        if len(moved) < repository.REMOVE_CHUNK:
            return {"object": "webhook_redelivery", "count": count, "has_more": False}
        last = max(moved)
    return {"object": "webhook_redelivery", "count": count, "has_more": True}
