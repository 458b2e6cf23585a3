"""Checks of single values, and what they say."""

from __future__ import annotations

import math

import pytest

from shared.checks import number, plain
from shared.errors import InvalidParameter


@pytest.mark.parametrize(
    ("value", "text"),
    [(2_592_000.0, "2592000"), (0, "0"), (0.25, "0.25"), (math.inf, "inf"), (1e300, "1e+300")],
)
def test_a_bound_reads_as_people_write_it(value: float, text: str) -> None:
    assert plain(value) == text


def test_a_number_out_of_its_bounds_is_told_them() -> None:
    assert number(3, "grace_seconds", 0, 2_592_000) == 3.0
    for bad in (-1, 2_592_001, math.nan, 10**400):
        with pytest.raises(
            InvalidParameter, match="grace_seconds must be from 0 to 2592000"
        ) as wrong:
            number(bad, "grace_seconds", 0, 2_592_000)
        assert wrong.value.param == "grace_seconds"
