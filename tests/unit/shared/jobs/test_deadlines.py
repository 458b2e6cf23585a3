"""Moments as clients write them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from shared.errors import InvalidParameter
from shared.jobs.deadlines import moment_of


@pytest.mark.parametrize(
    "value",
    [
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-12:00",
        float("nan"),
        float("inf"),
        1e300,
        -(10**30),
        "",
        "tomorrow",
        True,
        None,
        [],
    ],
)
def test_what_is_no_moment(value: Any) -> None:
    with pytest.raises(InvalidParameter) as wrong:
        moment_of(value, "complete_by")
    assert wrong.value.param == "complete_by"


def test_moments_are_in_utc() -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    for value in (
        "2026-01-01T12:00:00",
        "2026-01-01T12:00Z",
        "2026-01-01T14:00:00+02:00",
        noon.timestamp(),
    ):
        assert moment_of(value, "x") == noon and moment_of(value, "x").tzinfo is UTC
