"""All SQL about API keys: statements that sync and async sessions both execute."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Insert,
    Select,
    Table,
    Update,
    func,
    insert,
    null,
    or_,
    select,
    update,
)

from shared.db.expressions import seconds
from shared.db.tables import ApiKey

KEYS = cast(Table, ApiKey.__table__)
_K = KEYS.c
USED_EVERY_SECONDS = 60.0  # how exact last_used_at is


def create(
    key_id: str,
    *,
    name: str,
    tenant: str,
    key_hash: str,
    scopes: Sequence[str],
    webhook_secret: str,
    requests_per_minute: int | None,
    max_queued_jobs: int | None,
    max_queued_tokens: int | None,
    weight: int,
    expires_at: datetime | None,
) -> Insert:
    return insert(KEYS).values(
        id=key_id,
        name=name,
        tenant=tenant,
        key_hash=key_hash,
        scopes=list(scopes),
        webhook_secret=webhook_secret,
        requests_per_minute=requests_per_minute,
        max_queued_jobs=max_queued_jobs,
        max_queued_tokens=max_queued_tokens,
        weight=weight,
        expires_at=expires_at,
    )


def _with_state() -> Select[Any]:
    """Select rows with `usable`, `previous_usable` and `use_is_old` (see `note_use`), by the
    database's clock.
    """
    usable = _K.revoked_at.is_(None) & or_(_K.expires_at.is_(None), _K.expires_at > func.now())
    previous = (_K.previous_until.is_not(None)) & (_K.previous_until > func.now())
    return select(
        KEYS,
        usable.label("usable"),
        previous.label("previous_usable"),
        _use_is_old().label("use_is_old"),
    )


def _use_is_old() -> ColumnElement[bool]:
    return or_(
        _K.last_used_at.is_(None), _K.last_used_at < func.now() - seconds(USED_EVERY_SECONDS)
    )


def get(key_id: str) -> Select[Any]:
    return _with_state().where(_K.id == key_id)


def page(tenant: str | None, *, before: str | None, limit: int) -> Select[Any]:
    """Newest first, one row more than asked; None is all tenants."""
    found = _with_state().order_by(_K.id.desc()).limit(limit + 1)
    if tenant is not None:
        found = found.where(_K.tenant == tenant)
    return found if before is None else found.where(_K.id < before)


def all_keys() -> Select[Any]:
    return select(KEYS).order_by(_K.created_at, _K.id)


def tenant_exists(tenant: str) -> Select[Any]:
    return select(_K.id).where(_K.tenant == tenant).limit(1)


def revoke(key_id: str) -> Update:
    """Returns the id, or nothing when it was revoked before or never was."""
    return (
        update(KEYS)
        .where(_K.id == key_id, _K.revoked_at.is_(None))
        .values(revoked_at=func.now(), previous_hash=null(), previous_until=null())
        .returning(_K.id)
    )


def rotate(key_id: str, *, key_hash: str, grace_seconds: float) -> Update:
    """Another secret for the key; the former one goes on for `grace_seconds`."""
    return (
        update(KEYS)
        .where(_K.id == key_id, _K.revoked_at.is_(None))
        .values(
            previous_hash=_K.key_hash if grace_seconds > 0 else null(),
            previous_until=func.now() + seconds(grace_seconds) if grace_seconds > 0 else null(),
            key_hash=key_hash,
        )
        .returning(_K.id)
    )


def note_use(key_id: str) -> Update:
    """Write at most once a minute and key, so that a busy key costs no write per request."""
    return update(KEYS).where(_K.id == key_id, _use_is_old()).values(last_used_at=func.now())
