"""Intervals between two readings of an evaluation."""

from __future__ import annotations

import pytest

from shared.evaluations.caretaker import (
    CANCEL_LOOK_SECONDS,
    LOOK_SECONDS,
    REST_SECONDS_MAX,
    pause_after,
)


@pytest.mark.parametrize(
    "took,pause",
    [
        (0.0, LOOK_SECONDS),
        (0.1, LOOK_SECONDS),
        (0.5, 2.5),
        (1.0, REST_SECONDS_MAX),
        (600.0, REST_SECONDS_MAX),
    ],
)
def test_the_longer_a_look_the_rarer_but_never_long_apart(took: float, pause: float) -> None:
    assert pause_after(took, cancelling=False) == pause
    assert (
        pause_after(took, cancelling=True) == CANCEL_LOOK_SECONDS
    )  # who cancels waits for the end
    assert LOOK_SECONDS < REST_SECONDS_MAX
