"""Writes that must not be lost: tried again through every outage, and no longer than they should
be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.db import retries
from shared.db.retries import persist


def refusal(state: str | None, kind: type[DBAPIError] = OperationalError) -> DBAPIError:
    class Driver(Exception):
        sqlstate = state

    return kind("UPDATE jobs", {}, Driver("no"))


class Failing:
    """A database whose first transactions end with these errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.transactions = 0

    @contextmanager
    def write(self) -> Iterator[Any]:
        self.transactions += 1
        yield None
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(retries, "WAIT_MAX_SECONDS", 0.0)


OUTAGES = [
    refusal(state)
    for state in ("08006", "25006", "53300", "57P01", "57014", "40001", "40P01", None)
]


def test_every_outage_is_tried_again() -> None:
    database = Failing(*OUTAGES, PoolTimeout(), ConnectionResetError())
    seen: list[bool] = []
    assert persist(database, lambda session, again: seen.append(again) or "made") == "made"  # type: ignore[arg-type]
    assert seen == [False] + [True] * (len(OUTAGES) + 2)


@pytest.mark.parametrize(
    "error", [refusal("23505", ProgrammingError), refusal("22P05"), ValueError("a bug")]
)
def test_a_refusal_is_raised_at_once(error: Exception) -> None:
    database = Failing(error)
    with pytest.raises(type(error)):
        persist(database, lambda session, again: None)  # type: ignore[arg-type]
    assert database.transactions == 1


def test_it_ends_when_it_should() -> None:
    database = Failing(*OUTAGES)
    with pytest.raises(OperationalError):
        persist(database, lambda session, again: None, give_up=lambda: database.transactions >= 3)  # type: ignore[arg-type]
    assert database.transactions == 3
