"""What statements of several repositories are made of."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Interval, literal


def seconds(value: float) -> ColumnElement[Any]:
    """A span of time, to be added to `now()` of the database or taken from it."""
    return literal(timedelta(seconds=value), Interval)
