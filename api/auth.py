"""Who is asking, and whether they may: bearer keys, scopes, and the limit of requests per minute.

    VDIFF_AUTH=auto       a key is needed as soon as the server listens beyond loopback, or VDIFF_API_KEY is set
    VDIFF_AUTH=required   always        VDIFF_AUTH=open   never, whoever can reach the port

On loopback without keys the Host must be loopback's: else a name that somebody points to 127.0.0.1 once his page is open in
a browser (DNS rebinding) would be this server's own site. Where no key is needed, any Authorization value is accepted; one
that is a valid key of ours still acts for its tenant, everything else is the anonymous tenant. A key's row is trusted for a
second, so a revocation works after as long; a new secret works at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from api.dependencies import Context, ContextDep
from shared.db.session import AsyncDatabase, is_outage
from shared.errors import Forbidden, NotAuthenticated
from shared.keys import repository, tokens
from shared.keys.principal import ANONYMOUS, DEFAULT_SCOPES, Limits, Principal, Scope
from shared.settings import Settings, is_loopback

TRUSTED_SECONDS = 1.0
AWAY_TRUSTED_SECONDS = 300.0  # as long as the database is away
CACHE_MAX = 10_000

_bearer = HTTPBearer(auto_error=False, description="an API key (`vdiff keys create`); not needed on loopback")


def key_required(settings: Settings) -> bool:
    if settings.auth == "auto":
        return settings.api_key is not None or not is_loopback(settings.host)
    return settings.auth == "required"


def names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, is this machine's own name for itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


class Authenticator:
    """Turns an Authorization header into a `Principal`; one per API process."""

    def __init__(self, database: AsyncDatabase, settings: Settings) -> None:
        self._database = database
        self._static = settings.api_key.get_secret_value() if settings.api_key is not None else None
        self._required = key_required(settings)
        self._local = settings.auth == "auto" and not self._required
        limits = Limits(settings.requests_per_minute, settings.max_queued_jobs, settings.max_queued_tokens)
        self._defaults = limits
        scopes = frozenset(Scope if is_loopback(settings.host) else DEFAULT_SCOPES)
        self._operator = Principal(ANONYMOUS, frozenset(Scope), limits, operator=True)
        self._anonymous = Principal(ANONYMOUS, scopes, limits)
        self._rows: dict[str, tuple[float, Row[Any] | None]] = {}

    async def principal(self, key: str | None, host: str | None = None) -> Principal:
        """The caller.

        Args:
            host: the request's Host, if it has one.

        Raises:
            NotAuthenticated: a key is needed, and this is none.
            Forbidden: none is needed on loopback, and this host is none.
        """
        if key is not None:
            found = await self._known(key)
            if found is not None:
                return found
        if not self._required:
            if self._local and host and not names_loopback(host):
                message = (
                    f"no key is needed on loopback, but {host[:80]!r} is none: ask for localhost or 127.0.0.1, send a key, or "
                    "set VDIFF_AUTH=open if a proxy of yours stands before this server"
                )
                raise Forbidden(message, code="host_not_allowed", param="Host")
            return self._anonymous
        if key is None:
            raise NotAuthenticated("an API key is needed: send Authorization: Bearer KEY")
        raise NotAuthenticated("the API key is not known, expired or revoked")

    async def _known(self, key: str) -> Principal | None:
        if self._static is not None and tokens.same_text(key, self._static):
            return self._operator
        key_id = tokens.key_id_of(key)
        if key_id is None:
            return None
        row = self._trusted(key_id)
        if row is None or not _accepts(row, key):
            row = await self._read(key_id)  # not read lately, or rotated since
        if row is None or not _accepts(row, key):
            return None
        return Principal(row.tenant, frozenset(row.scopes), self.limits_of(row._mapping), row.id)

    def limits_of(self, row: Mapping[Any, Any]) -> Limits:
        """A key's limits; those that it does not name are the server's."""
        return Limits(
            row["requests_per_minute"] or self._defaults.requests_per_minute,
            row["max_queued_jobs"] or self._defaults.queued_jobs,
            row["max_queued_tokens"] or self._defaults.queued_tokens,
        )

    def _trusted(self, key_id: str) -> Row[Any] | None:
        read_at, row = self._rows.get(key_id, (float("-inf"), None))
        return row if time.monotonic() - read_at < TRUSTED_SECONDS else None

    async def _read(self, key_id: str) -> Row[Any] | None:
        read_at, row = self._rows.get(key_id, (float("-inf"), None))
        try:
            async with self._database.read() as session:
                found: Row[Any] | None = (await session.execute(repository.get(key_id))).one_or_none()
                if found is not None and found.usable:
                    await session.execute(repository.note_use(key_id))
        except (SQLAlchemyError, OSError) as exc:
            # While the database is away nobody revokes a key in it, and whoever is known may still ask how we are.
            if row is not None and time.monotonic() - read_at < AWAY_TRUSTED_SECONDS and is_outage(exc):
                return row
            raise
        if len(self._rows) >= CACHE_MAX:  # ids are free to invent
            self._rows.clear()
        self._rows[key_id] = (time.monotonic(), found)
        return found


def _accepts(row: Row[Any], key: str) -> bool:
    return row.usable and tokens.matches(key, row.key_hash, row.previous_hash if row.previous_usable else None)


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def caller_of(request: Request, context: ContextDep, credentials: Credentials) -> Principal:
    """The caller, whose request is not counted yet. Raises NotAuthenticated, Forbidden."""
    key = None if credentials is None else credentials.credentials
    return await context.auth.principal(key, request.headers.get("host"))


CallerDep = Annotated[Principal, Depends(caller_of)]


async def count_request(request: Request, context: Context, principal: Principal) -> None:
    """Count this request, once however often it is asked for. Raises TooManyRequests."""
    if not hasattr(request.state, "rate_headers"):
        request.state.rate_headers = await context.limiter.hit(principal)


def rate_line(principal: Principal) -> str:
    """Who shares a limit of requests per minute."""
    return f"requests {principal.key_id or principal.tenant}"


async def principal_of(request: Request, context: ContextDep, principal: CallerDep) -> Principal:
    """The caller, within its requests per minute. Raises NotAuthenticated, TooManyRequests."""
    await count_request(request, context, principal)
    return principal


PrincipalDep = Annotated[Principal, Depends(principal_of)]


def requires(*scopes: Scope, counted: bool = True) -> Any:
    """A dependency for a router: the caller has one of the scopes. Raises Forbidden.

    Args:
        counted: False where the route counts its request itself, because it lets it wait.
    """

    def check(principal: Principal) -> None:
        if not any(principal.may(scope) for scope in scopes):
            raise Forbidden(f"this API key lacks the scope {' or '.join(repr(scope.value) for scope in scopes)}")

    async def check_counted(principal: PrincipalDep) -> None:
        check(principal)

    async def check_caller(principal: CallerDep) -> None:
        check(principal)

    return Depends(check_counted if counted else check_caller)
