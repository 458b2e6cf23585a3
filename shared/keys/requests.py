"""Requests about keys: checks of fields and scopes, and rows as the wire shows them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared import checks
from shared.errors import Forbidden, InvalidParameter, MissingParameter, UnknownParameter
from shared.jobs.deadlines import moment_of
from shared.keys.principal import DEFAULT_SCOPES, Limits, Scope

LIMITS = ("requests_per_minute", "max_queued_jobs", "max_queued_tokens")
FIELDS = ("name", "scopes", "tenant", *LIMITS, "weight", "expires_at")
WEIGHT_MAX = 1000
LIMIT_MAX = 2**31 - 1
GRACE_SECONDS_MAX = 30 * 86_400
_TEXT_MAX = 100


def name_of(value: Any) -> str:
    """Raises InvalidParameter."""
    if not isinstance(value, str) or not 1 <= len(value) <= _TEXT_MAX or not value.isprintable():
        raise InvalidParameter(
            f"a key's name has 1 to {_TEXT_MAX} printable characters", param="name"
        )
    return value


def tenant_of(value: Any) -> str:
    """Raises InvalidParameter."""
    good = (
        isinstance(value, str)
        and 1 <= len(value) <= _TEXT_MAX
        and value.isprintable()
        and " " not in value
    )
    if not good:
        message = f"a tenant has 1 to {_TEXT_MAX} printable characters without spaces"
        raise InvalidParameter(message, param="tenant")
    return str(value)


def _scopes(value: Any) -> list[str]:
    known = [s.value for s in Scope]
    if not isinstance(value, list) or not value or any(s not in known for s in value):
        raise InvalidParameter(
            f"scopes must be a list of some of {', '.join(known)}", param="scopes"
        )
    return list(dict.fromkeys(value))


@dataclass(frozen=True, slots=True)
class Giver:
    """The caller that makes or rotates a key. It cannot give more than it has: tenant, limits,
    weight and time.

    The operator (`VDIFF_API_KEY`) has no bounds. `scopes` need no look: who may make keys has
    `admin`, which is all of them.
    """

    tenant: str
    limits: Limits
    weight: int = 1
    expires_at: datetime | None = None
    operator: bool = False

    def check(self, tenant: str, limits: Limits, weight: int, expires_at: datetime | None) -> None:
        """Raises Forbidden: a key like that would be more than its giver."""
        if self.operator:
            return
        if tenant != self.tenant:
            raise Forbidden(
                "a key of another tenant is for the operator (VDIFF_API_KEY) to give",
                param="tenant",
            )
        own = (self.limits.requests_per_minute, self.limits.queued_jobs, self.limits.queued_tokens)
        asked = (limits.requests_per_minute, limits.queued_jobs, limits.queued_tokens)
        for name, mine, theirs in zip(LIMITS, own, asked, strict=True):
            if mine is not None and (theirs is None or theirs > mine):
                raise Forbidden(f"{name} would be above this key's own, {mine}", param=name)
        if weight > self.weight:
            raise Forbidden(f"weight would be above this key's own, {self.weight}", param="weight")
        if self.expires_at is not None and (expires_at is None or expires_at > self.expires_at):
            raise Forbidden("the key would outlive this one, which expires", param="expires_at")


def key_values(body: Any, giver: Giver) -> dict[str, Any]:
    """Columns of a new key; limits and end that are not named are the giver's. Raises the kinds of
    InvalidRequest.
    """
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be an object", param="body")
    for name in body:
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise UnknownParameter(
                f"{name[:80]} is not a field of a key; known: {known}", param=name[:80]
            )
    given = {k: v for k, v in body.items() if v is not None}
    if "name" not in given:
        raise MissingParameter("name is required", param="name")
    own: dict[str, Any] = {}
    if not giver.operator:
        limits = (
            giver.limits.requests_per_minute,
            giver.limits.queued_jobs,
            giver.limits.queued_tokens,
        )
        own = {**dict(zip(LIMITS, limits, strict=True)), "expires_at": giver.expires_at}
    return {
        "name": name_of(given["name"]),
        "tenant": tenant_of(given.get("tenant", giver.tenant)),
        "scopes": _scopes(given.get("scopes", [s.value for s in DEFAULT_SCOPES])),
        **{
            name: checks.integer(given[name], name, 1, LIMIT_MAX)
            if name in given
            else own.get(name)
            for name in LIMITS
        },
        "weight": checks.integer(given.get("weight", 1), "weight", 1, WEIGHT_MAX),
        "expires_at": moment_of(given["expires_at"], "expires_at")
        if "expires_at" in given
        else own.get("expires_at"),
    }


def _moment(value: Any) -> int | None:
    return None if value is None else int(value.timestamp())


def key_object(row: Mapping[Any, Any], *, key: str | None = None) -> dict[str, Any]:
    """Args: key: the key itself, which shows when it was made just now."""
    return {
        "id": row["id"],
        "object": "api_key",
        "name": row["name"],
        "tenant": row["tenant"],
        "scopes": row["scopes"],
        "state": "revoked"
        if row["revoked_at"] is not None
        else "good"
        if row["usable"]
        else "expired",
        **{name: row[name] for name in LIMITS},
        "weight": row["weight"],
        "created_at": _moment(row["created_at"]),
        "last_used_at": _moment(row["last_used_at"]),
        "expires_at": _moment(row["expires_at"]),
        "revoked_at": _moment(row["revoked_at"]),
        "previous_until": _moment(row["previous_until"]),
        **({} if key is None else {"key": key}),
    }
