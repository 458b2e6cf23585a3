"""Canvases as differences: the reader has the writer's text, and bytes grow with the steps, not
with their square.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.canvas import STEP_BYTES, CanvasReader, CanvasWriter, difference

MASK = "\u2591"


def size(fields: dict[str, Any]) -> int:
    return len(json.dumps(fields, ensure_ascii=False).encode())


def frames(tokens: int, order: str, per_step: int = 1) -> list[str]:
    """The canvases of an answer whose tokens are committed from the left, at random places, or in
    blocks of 32.
    """
    places = list(range(tokens))
    if order == "random":
        random.Random(tokens).shuffle(places)
    elif order == "blocks":
        blocks = [places[i : i + 32] for i in range(0, tokens, 32)]
        for block in blocks:
            random.Random(block[0]).shuffle(block)
        places = [place for block in blocks for place in block]
    cells, made = [MASK] * tokens, []
    for begin in range(0, tokens, per_step):
        for place in places[begin : begin + per_step]:
            cells[place] = f"w{place} "
        made.append("".join(cells))
    return made


@pytest.mark.parametrize("order", ["left", "blocks", "random"])
@pytest.mark.parametrize("per_step", [1, 4])
def test_bytes_are_linear_in_the_steps(order: str, per_step: int) -> None:
    totals = {}
    for tokens in (256, 1_024, 4_096):
        writer, reader, total, told = CanvasWriter(), CanvasReader(), 0, 0
        made = frames(tokens, order, per_step)
        for step, canvas in enumerate(made, 1):
            fields = writer.fields(canvas)
            total += size(fields)
            if reader.hear({"attempt": 1, **fields}):
                told += 1
                assert reader.canvas == canvas
            assert total <= (STEP_BYTES + 100) * step + size({"canvas": made[0]})
        totals[tokens] = total
        assert told >= len(made) / 64  # it does move
        if order == "left":
            assert told >= len(made) - 16  # the first whole canvas is paid for afterwards
    assert (
        totals[4_096] <= 5 * totals[1_024]
    )  # four times the answer: four times the bytes, not sixteen
    whole = sum(size({"canvas": canvas}) for canvas in frames(4_096, order, per_step))
    assert totals[4_096] < whole / 3


@given(
    st.lists(st.text(alphabet="ab\u2591\u00e9\U0001f600", max_size=12), max_size=30),
    st.sets(st.integers(0, 29)),
)
def test_a_reader_has_the_writers_canvas_or_none(canvases: list[str], lost: set[int]) -> None:
    writer, reader, missed = CanvasWriter(), CanvasReader(), False
    for number, canvas in enumerate(canvases):
        fields = writer.fields(canvas)
        assert size(fields) < 3 * size({"canvas": canvas}) + 100
        if number in lost:
            missed = missed or bool(fields)
            continue
        if reader.hear({"attempt": 1, **fields}):
            missed = False
            assert reader.canvas == canvas
        elif not missed and fields:
            raise AssertionError("a frame that follows the last one was not taken")


@given(st.text(alphabet="ab\u2591", max_size=20), st.text(alphabet="ab\u2591", max_size=20))
def test_a_difference_makes_one_of_the_other(before: str, after: str) -> None:
    change = difference(before, after)
    assert before[: change["from"]] + change["text"] + before[change["to"] :] == after


def test_repeated_events_and_other_attempts() -> None:
    writer, reader = CanvasWriter(), CanvasReader()
    events = [{"attempt": 1, **writer.fields(canvas)} for canvas in ("...", "a..", "ab.")]
    assert [reader.hear(event) for event in [*events, *events[1:]]] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert reader.canvas == "ab."
    again = CanvasWriter()
    assert reader.hear({"attempt": 2, **again.fields("...")}) and reader.canvas == "..."
    assert not reader.hear({**events[1], "frame": 2})  # of the attempt before
    assert reader.hear(
        {"attempt": 2, "canvas": "old", "index": 0}
    )  # a worker of an earlier release has no frames
    assert reader.canvas == "old"


@pytest.mark.parametrize(
    "change",
    [
        None,
        7,
        {},
        {"from": 0, "to": 9, "text": ""},
        {"from": 2, "to": 1, "text": ""},
        {"from": -1, "to": 1, "text": ""},
        {"from": "0", "to": 1, "text": ""},
        {"from": 0, "to": 1, "text": 5},
    ],
)
def test_what_no_writer_said_changes_nothing(change: Any) -> None:
    reader = CanvasReader()
    reader.hear({"attempt": 1, "canvas": "abc", "frame": 1})
    assert not reader.hear({"attempt": 1, "canvas_change": change, "frame": 2})
    assert reader.canvas == "abc"
