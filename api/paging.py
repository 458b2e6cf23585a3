"""Lists: `limit`; and OpenAI's, with `after` in and `first_id`, `last_id`, `has_more` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request

from shared.errors import InvalidParameter


def whole_number(text: str) -> int | None:
    """Parse at most nine ASCII digits; return None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None


def page_limit(value: str | None, default: int, most: int) -> int:
    """Raises InvalidParameter."""
    if value is None:
        return default
    number = whole_number(value)
    if number is None or not 1 <= number <= most:
        raise InvalidParameter(f"limit must be from 1 to {most}", param="limit")
    return number


def no_nul(request: Request) -> None:
    """Raises InvalidParameter: PostgreSQL cannot take such a character."""
    for name, value in request.query_params.multi_items():
        if "\x00" in value:
            raise InvalidParameter(f"{name} has a NUL character", param=name)


def page_object(objects: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """Args: objects: one more than `size` when there is more."""
    page = list(objects[:size])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(objects) > size,
    }
