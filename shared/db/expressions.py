"""Expressions that statements of several repositories share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Interval, Text, func, literal


def seconds(value: float) -> ColumnElement[Any]:
    """A span of time, to be added to `now()` of the database or taken from it."""
    return literal(timedelta(seconds=value), Interval)


def turn_of(tenant: ColumnElement[str], served: Sequence[str]) -> ColumnElement[int]:
    """The place of a tenant's turn: 0 for one that is not in `served`, then in its order."""
    position = func.array_position(literal(list(served), ARRAY(Text)), tenant)
    return func.coalesce(position, 0)
