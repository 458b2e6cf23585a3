"""Authentication and authorisation: bearer keys, scopes, and the limit of requests per minute.

    VDIFF_AUTH=auto       a key is needed as soon as the server listens beyond loopback, or
                          VDIFF_API_KEY is set
    VDIFF_AUTH=required   always        VDIFF_AUTH=open   never, whoever can reach the port

On loopback without keys the Host must be loopback's: else a name that somebody points to 127.0.0.1
once his page is open in a browser (DNS rebinding) would be this server's own site. Where no key is
needed, any Authorization value is accepted; one that is a valid key of ours still acts for its
tenant, everything else is the anonymous tenant. A key's row is trusted for a second, so a
revocation works after as long; a new secret works at once.

The secret is compared before anything is written. `api.guesses` bounds what keys that are not ours
cost.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from api.dependencies import Context, ContextDep
from api.guesses import Guesses, RefusedKeys
from shared.db.session import AsyncDatabase, is_outage
from shared.errors import Forbidden, NotAuthenticated
from shared.keys import repository, tokens
from shared.keys.limits import default_limits, limits_of
from shared.keys.principal import ANONYMOUS, DEFAULT_SCOPES, Limits, Principal, Scope
from shared.settings import Settings, is_loopback

TRUSTED_SECONDS = 1.0
AWAY_TRUSTED_SECONDS = 300.0  # as long as the database is away
CACHE_MAX = 10_000

_bearer = HTTPBearer(
    auto_error=False, description="an API key (`vdiff keys create`); not needed on loopback"
)


def key_required(settings: Settings) -> bool:
    if settings.auth == "auto":
        return settings.api_key is not None or not is_loopback(settings.host)
    return settings.auth == "required"


def names_loopback(host: str) -> bool:
    """Return whether a Host header, with or without a port, is this machine's own name for itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def is_allowed(host: str, allowed: Collection[str]) -> bool:
    """Return whether a Host header, with or without a port, is among the names; `*.lan` stands for
    all below.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in allowed or any(a.startswith("*.") and name.endswith(a[1:]) for a in allowed)


_log = structlog.get_logger(__name__)


class Authenticator:
    """Turns an Authorization header into a `Principal`; one per API process."""

    def __init__(self, database: AsyncDatabase, settings: Settings) -> None:
        self._database = database
        self._static = settings.api_key.get_secret_value() if settings.api_key is not None else None
        self._required = key_required(settings)
        self._local = settings.auth == "auto" and not self._required
        self._hosts = settings.allowed_hosts
        limits = default_limits(settings)
        self._defaults = limits
        scopes = frozenset(Scope if is_loopback(settings.host) else DEFAULT_SCOPES)
        self._operator = Principal(ANONYMOUS, frozenset(Scope), limits, operator=True)
        self._anonymous = Principal(ANONYMOUS, scopes, limits)
        self._rows: OrderedDict[str, tuple[float, Row[Any]]] = (
            OrderedDict()
        )  # of keys that were accepted
        self._guesses = Guesses()
        self._refused = RefusedKeys()

    async def principal(
        self, key: str | None, host: str | None = None, address: str | None = None
    ) -> Principal:
        """Return the caller.

        Args:
            host: the request's Host, if it has one.
            address: the client's address, if it is known.

        Raises:
            NotAuthenticated: an API key is required, and this one is missing or invalid.
            TooManyRequests: too many invalid keys came from the address.
            Forbidden: no key is required on loopback, but the Host is not a loopback name.
        """
        if key is not None:
            found = await self._known(key, address)
            if found is not None:
                return found
        if not self._required:
            if self._local and host and not (names_loopback(host) or is_allowed(host, self._hosts)):
                message = (
                    f"no key is needed on loopback, but {host[:80]!r} is none: ask for localhost or 127.0.0.1, send a key, "
                    "name the host in VDIFF_ALLOWED_HOSTS, or set VDIFF_AUTH=open if a proxy of yours stands before this server"
                )
                raise Forbidden(message, code="host_not_allowed", param="Host")
            return self._anonymous
        if key is None:
            raise NotAuthenticated("an API key is needed: send Authorization: Bearer KEY")
        raise NotAuthenticated("the API key is not known, expired or revoked")

    async def _known(self, key: str, address: str | None) -> Principal | None:
        if self._static is not None and tokens.same_text(key, self._static):
            return self._operator
        key_id = tokens.key_id_of(key)
        if key_id is None:
            if self._required:  # else it is one of the values that mean nothing here
                self._guesses.take(address)
            return None
        read_at, row = self._rows.get(key_id, (float("-inf"), None))
        was_good = row is not None and _accepts(row, key)
        if was_good and time.monotonic() - read_at < TRUSTED_SECONDS:
            return self._principal(row)
        key_hash = tokens.hash_key(key)
        if key_hash in self._refused:
            return None
        if not was_good:
            self._guesses.take(address)
        row = await self._read(key_id, key, row if was_good else None, read_at)
        if row is None:
            self._refused.add(key_hash)
            return None
        if not was_good:
            self._guesses.give_back(address)
        return self._principal(row)

    def _principal(self, row: Row[Any] | None) -> Principal:
        assert row is not None
        return Principal(row.tenant, frozenset(row.scopes), self.limits_of(row._mapping), row.id)

    def limits_of(self, row: Mapping[Any, Any]) -> Limits:
        """A key's limits; those that it does not name are the server's."""
        return limits_of(row, self._defaults)

    async def _read(
        self, key_id: str, key: str, before: Row[Any] | None, read_at: float
    ) -> Row[Any] | None:
        """Read the row of a key and return it if the key is good.

        Args:
            before: the row as this process read it at `read_at`, if it accepted the key then.
        """
        try:
            async with self._database.read() as session:
                found: Row[Any] | None = (
                    await session.execute(repository.get(key_id))
                ).one_or_none()
                if found is None or not _accepts(found, key):
                    if before is not None:
                        self._rows.pop(key_id, None)
                    return None
        except (SQLAlchemyError, OSError) as exc:
            # While the database is away nobody revokes a key in it, and whoever is known may still
            # ask how we are.
            if (
                before is not None
                and time.monotonic() - read_at < AWAY_TRUSTED_SECONDS
                and is_outage(exc)
            ):
                return before
            raise
        self._rows.pop(key_id, None)
        self._rows[key_id] = (time.monotonic(), found)
        if len(self._rows) > CACHE_MAX:
            self._rows.popitem(last=False)
        if found.use_is_old:
            await self._note_use(key_id)
        return found

    async def _note_use(self, key_id: str) -> None:
        """Store when the key was used last. A database that only reads keeps nobody out."""
        try:
            async with self._database.write() as session:
                await session.execute(repository.note_use(key_id))
        except (SQLAlchemyError, OSError) as exc:
            if not is_outage(exc):
                raise
            _log.warning("key_use_not_noted", key_id=key_id, error=type(exc).__name__)


def _accepts(row: Row[Any], key: str) -> bool:
    return row.usable and tokens.matches(
        key, row.key_hash, row.previous_hash if row.previous_usable else None
    )


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def caller_of(request: Request, context: ContextDep, credentials: Credentials) -> Principal:
    """Return the caller; its request is not counted yet. Raises NotAuthenticated, Forbidden,
    TooManyRequests.
    """
    key = None if credentials is None else credentials.credentials
    address = None if request.client is None else request.client.host
    return await context.auth.principal(key, request.headers.get("host"), address)


CallerDep = Annotated[Principal, Depends(caller_of)]


async def count_request(request: Request, context: Context, principal: Principal) -> None:
    """Count this request, once however often it is asked for. Raises TooManyRequests."""
    if not hasattr(request.state, "rate_headers"):
        request.state.rate_headers = await context.limiter.hit(principal)


def rate_line(principal: Principal) -> str:
    """Return the name under which requests share a limit of requests per minute."""
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
            raise Forbidden(
                f"this API key lacks the scope {' or '.join(repr(scope.value) for scope in scopes)}"
            )

    async def check_counted(principal: PrincipalDep) -> None:
        check(principal)

    async def check_caller(principal: CallerDep) -> None:
        check(principal)

    return Depends(check_counted if counted else check_caller)
