"""The limits of a key: its own, and the server's where it names none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from shared.keys import repository
from shared.keys.principal import Limits
from shared.settings import Settings


def default_limits(settings: Settings) -> Limits:
    return Limits(
        settings.requests_per_minute, settings.max_queued_jobs, settings.max_queued_tokens
    )


def limits_of(row: Mapping[Any, Any], defaults: Limits) -> Limits:
    """Return the limits of a key's row."""
    return Limits(
        row["requests_per_minute"] or defaults.requests_per_minute,
        row["max_queued_jobs"] or defaults.queued_jobs,
        row["max_queued_tokens"] or defaults.queued_tokens,
    )


async def read_limits(session: AsyncSession, key_id: str, settings: Settings) -> Limits:
    """Read the limits of a key as they are now; the server's for an empty id, or a key that is
    gone.
    """
    defaults = default_limits(settings)
    row = (await session.execute(repository.get(key_id))).one_or_none() if key_id else None
    return defaults if row is None else limits_of(row._mapping, defaults)
