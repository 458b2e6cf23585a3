"""API keys over HTTP: what `vdiff keys` does in the database, within one's own tenant.

The operator, whose key is `VDIFF_API_KEY`, sees and makes keys of every tenant.
"""

from __future__ import annotations

from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Row

from api.auth import PrincipalDep, requires
from api.dependencies import Context, ContextDep, JsonBody, optional_body
from shared import checks
from shared.errors import Conflict, InvalidParameter, NotFound
from shared.ids import is_id
from shared.keys import repository, tokens
from shared.keys.principal import Principal, Scope
from shared.keys.requests import FIELDS, GRACE_SECONDS_MAX, Giver, key_object, key_values
from shared.links import link
from shared.webhooks.secrets import new_secret

own = APIRouter(prefix="/v1", tags=["keys"])  # of any caller
router = APIRouter(prefix="/v1/keys", tags=["keys"], dependencies=[requires(Scope.ADMIN)])

DEFAULT_PAGE, MAX_PAGE = 50, 100
DEFAULT_GRACE_SECONDS = 24 * 3600
_BODY = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {name: {} for name in FIELDS},
                }
            }
        }
    }
}
_log = structlog.get_logger(__name__)


async def _row(context: Context, key_id: str, tenant: str | None) -> Row[Any]:
    """Return the key of one tenant, or of any tenant for None. Raises NotFound."""
    if is_id(key_id, tokens.ID_PREFIX):
        async with context.database.read() as session:
            row: Row[Any] | None = (await session.execute(repository.get(key_id))).one_or_none()
        if row is not None and tenant in (None, row.tenant):
            return row
    raise NotFound(f"no key {key_id[:80]!r}", param="key_id")


def _tenant(principal: Principal) -> str | None:
    return None if principal.operator else principal.tenant


async def _giver(context: Context, principal: Principal) -> Giver:
    if principal.key_id is None:
        return Giver(principal.tenant, principal.limits, operator=principal.operator)
    row = await _row(context, principal.key_id, principal.tenant)
    return Giver(principal.tenant, principal.limits, row.weight, row.expires_at)


@own.get("/keys/self")
async def self_(context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """Return the caller's tenant, scopes and limits, and its key where it has one."""
    row = (
        None
        if principal.key_id is None
        else await _row(context, principal.key_id, principal.tenant)
    )
    limits = principal.limits
    return {
        "object": "caller",
        "tenant": principal.tenant,
        "scopes": [scope.value for scope in Scope if principal.may(scope)],
        "requests_per_minute": limits.requests_per_minute,
        "max_queued_jobs": limits.queued_jobs,
        "max_queued_tokens": limits.queued_tokens,
        "key": None if row is None else key_object(row._mapping),
    }


@router.get("")
async def list_keys(
    context: ContextDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
    cursor: str | None = None,
) -> dict[str, Any]:
    """The tenant's keys, revoked ones too, newest first; never the keys themselves."""
    if cursor is not None and not is_id(cursor, tokens.ID_PREFIX):
        raise InvalidParameter("cursor must be one that a list gave", param="cursor")
    async with context.database.read() as session:
        statement = repository.page(_tenant(principal), before=cursor, limit=limit)
        rows = (await session.execute(statement)).all()
    shown, more = rows[:limit], len(rows) > limit
    return {
        "object": "list",
        "data": [key_object(row._mapping) for row in shown],
        "has_more": more,
        "next_cursor": shown[-1].id if more else None,
    }


@router.post("", status_code=201, openapi_extra=_BODY)
async def create(body: JsonBody, context: ContextDep, principal: PrincipalDep) -> JSONResponse:
    """Make a key; the answer holds it, this once. It can be no more than the key that asks."""
    giver = await _giver(context, principal)
    values = key_values(body, giver)
    giver.check(
        values["tenant"], context.auth.limits_of(values), values["weight"], values["expires_at"]
    )
    key_id = tokens.new_key_id()
    key = tokens.new_key(key_id)
    async with context.database.write() as session:
        await session.execute(
            repository.create(
                key_id,
                key_hash=tokens.hash_key(key),
                webhook_secret=context.vault.seal(new_secret()),
                **values,
            )
        )
    _log.info(
        "key_created",
        key_id=key_id,
        tenant=values["tenant"],
        scopes=values["scopes"],
        by=principal.key_id,
    )
    row = await _row(context, key_id, None)
    return JSONResponse(
        key_object(row._mapping, key=key), 201, {"Location": link(f"/v1/keys/{key_id}")}
    )


@router.get("/{key_id}")
async def get(key_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    return key_object((await _row(context, key_id, _tenant(principal)))._mapping)


@router.post("/{key_id}/rotate")
async def rotate(
    request: Request, key_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Another secret for the key, shown this once; the former one goes on for `grace_seconds` (a
    day).
    """
    given = await optional_body(request, ("grace_seconds",))
    grace = checks.number(
        given.get("grace_seconds", DEFAULT_GRACE_SECONDS), "grace_seconds", 0, GRACE_SECONDS_MAX
    )
    row = await _row(context, key_id, _tenant(principal))
    giver = await _giver(context, principal)
    # Whoever rotates a key holds it: not one that may do more than one's own.
    giver.check(row.tenant, context.auth.limits_of(row._mapping), row.weight, row.expires_at)
    key = tokens.new_key(key_id)
    async with context.database.write() as session:
        statement = repository.rotate(key_id, key_hash=tokens.hash_key(key), grace_seconds=grace)
        if (await session.execute(statement)).one_or_none() is None:
            raise Conflict("the key is revoked", code="key_revoked")
    _log.info("key_rotated", key_id=key_id, by=principal.key_id)
    return key_object((await _row(context, key_id, None))._mapping, key=key)


@router.post("/{key_id}/revoke")
async def revoke(key_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """End a key for good; API processes notice within a second. Its jobs stay. Once more changes
    nothing.
    """
    await _row(context, key_id, _tenant(principal))
    async with context.database.write() as session:
        await session.execute(repository.revoke(key_id))
    _log.info("key_revoked", key_id=key_id, by=principal.key_id)
    return key_object((await _row(context, key_id, None))._mapping)
