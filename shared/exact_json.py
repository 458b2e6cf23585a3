"""Equality of JSON values by the numbers that are written, not by the nearest doubles. Pure."""

from __future__ import annotations

from decimal import Decimal
from typing import Any


def json_equal(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal: 1 is 1.0, is not true, and the order of keys does
    not count.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool) and left == right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_equal(v, right[k]) for k, v in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_equal, left, right))
    return bool(_decimal(left) == _decimal(right)) and not isinstance(left, dict | list)


def _decimal(value: Any) -> Any:
    """Return a float as the number that is written, 0.1 and not the nearest binary fraction."""
    return Decimal(repr(value)) if isinstance(value, float) else value
