"""Identifiers: sortable by time, unguessable enough, with a prefix that says what they name."""

from __future__ import annotations

import os
import time
from datetime import datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base32: no i, l, o, u


def _base32(value: int, length: int) -> str:
    chars = []
    for _ in range(length):
        value, digit = divmod(value, 32)
        chars.append(_ALPHABET[digit])
    return "".join(reversed(chars))


def new_id(prefix: str, *, now_ms: int | None = None) -> str:
    """`prefix_` and 26 characters: 48 bits of milliseconds, then 80 random bits (the ULID layout)."""
    millis = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return f"{prefix}_{_base32(millis, 10)}{_base32(int.from_bytes(os.urandom(10), 'big'), 16)}"


def first_id(prefix: str, moment: datetime) -> str:
    """Return the smallest id that `new_id(prefix)` could have given at that moment: a bound for ids
    by time.
    """
    millis = min(max(0, int(moment.timestamp() * 1000)), (1 << 48) - 1)
    return f"{prefix}_{_base32(millis, 10)}{_ALPHABET[0] * 16}"


def is_id(text: str, prefix: str) -> bool:
    """Return whether `text` has the form that `new_id(prefix)` gives."""
    head, _, tail = text.partition("_")
    return head == prefix and len(tail) == 26 and all(c in _ALPHABET for c in tail)


def may_be_an_id(text: str) -> bool:
    """Return whether it is worth asking the database for it."""
    return 1 <= len(text) <= 100 and text.isascii() and text.isprintable()
