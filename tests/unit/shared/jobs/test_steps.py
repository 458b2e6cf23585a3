"""Stored steps of an answer: all of them, small, or nothing."""

from __future__ import annotations

import pytest

from shared.jobs.steps import StepLog, unpacked


def text(token: int) -> str:
    return f"<{token}>"


def test_steps_come_back_as_they_were_noted() -> None:
    log = StepLog(3, 100)
    log.note(0, 1, (4, 0), (7, 8), (0.91234, 1.0), 6)
    log.note(1, 1, (2,), (7,), (0.5,), 6)
    log.note(0, 2, (), (), (), 6)  # a step may commit nothing
    log.note(0, 3, (4, 1), (9, 7), (0.25, 0.0), 2)  # a token is replaced, and the answer ends
    kept = log.packed(text)
    assert kept is not None
    whole = unpacked(kept)
    first, second = whole["answers"]
    assert (whole["attempt"], first["canvas"], first["tokens_total"], second["tokens_total"]) == (
        3,
        6,
        2,
        6,
    )
    assert first["steps"] == [
        {
            "step": 1,
            "positions": [4, 0],
            "tokens": [7, 8],
            "texts": ["<7>", "<8>"],
            "confidence": [0.912, 1.0],
        },
        {"step": 2, "positions": [], "tokens": [], "texts": [], "confidence": []},
        {
            "step": 3,
            "positions": [4, 1],
            "tokens": [9, 7],
            "texts": ["<9>", "<7>"],
            "confidence": [0.25, 0.0],
        },
    ]
    assert second["steps"][0]["positions"] == [2]


def test_a_long_answer_is_small() -> None:
    log = StepLog(1, 4096)
    for step in range(4096):
        log.note(0, step + 1, (step,), ((step * 7919) % 120_000,), ((step % 997) / 997,), 4096)
    kept = log.packed(text)
    assert kept is not None and len(kept) < 20 * 4096
    assert len(unpacked(kept)["answers"][0]["steps"]) == 4096


@pytest.mark.parametrize(("limit", "kept"), [(4, True), (3, False), (0, False)])
def test_above_the_limit_nothing_is_kept_instead_of_a_part(limit: int, kept: bool) -> None:
    log = StepLog(1, limit)
    log.note(0, 1, (0, 1), (5, 5), (1.0, 1.0), 4)
    log.note(0, 2, (2, 3), (5, 5), (1.0, 1.0), 4)
    assert (log.packed(text) is not None) is kept
    if not kept:
        log.note(0, 3, (0,), (5,), (1.0,), 4)
        assert log.packed(text) is None


def test_lone_surrogates_are_stored_as_something() -> None:
    log = StepLog(1, 10)
    log.note(0, 1, (0,), (5,), (1.0,), 1)
    kept = log.packed(lambda _: "\ud800\x00")
    assert kept is not None and unpacked(kept)["answers"][0]["steps"][0]["texts"] == ["?\x00"]
