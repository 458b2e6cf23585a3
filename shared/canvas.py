"""The text of an answer while it comes out of the noise, told as differences
(`diffusion.visualize`).

A `progress` event has one of these, or neither:

    canvas         the whole current text
    canvas_change  {from, to, text}: characters from..to of the canvas before become `text`
    frame          the number of either; a change makes frame n of frame n - 1

A whole canvas in every event would be bytes by the square of an answer's length. Here a frame costs
what changed, a frame that costs much waits until enough steps have paid for it, and whole canvases
come first and then in proportion to the changes since the last. So the bytes of all frames together
are at most `STEP_BYTES` a step, however long the answer is.

A reader that missed a frame (Redis lost some, or it came late) has no canvas until the next whole
one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

STEP_BYTES = 2_048  # what each step pays for
WHOLE_SHARE = 4  # a whole canvas may cost so many times what the changes since the last one cost


class CanvasWriter:
    """The worker's side, for one answer of one attempt."""

    def __init__(self) -> None:
        self._told: str | None = None
        self._frame = 0
        self._paid = 0
        self._changes_cost = 0  # since the last whole canvas

    def fields(self, canvas: str) -> dict[str, Any]:
        """Return the fields of the next event that tell the canvas; none when the frame has to
        wait, or nothing changed.
        """
        self._paid += STEP_BYTES
        if self._told is None:
            return self._whole(canvas)
        if canvas == self._told:
            return {}
        whole_cost = _cost(canvas)
        change = difference(self._told, canvas)
        cost = _cost(change["text"]) + 40
        due = whole_cost <= cost or whole_cost <= WHOLE_SHARE * self._changes_cost
        if due and whole_cost <= self._paid:
            return self._whole(canvas)
        if cost > self._paid:
            return {}
        self._paid -= cost
        self._changes_cost += cost
        self._told = canvas
        self._frame += 1
        return {"canvas_change": change, "frame": self._frame}

    def _whole(self, canvas: str) -> dict[str, Any]:
        self._paid -= _cost(canvas)
        self._changes_cost = 0
        self._told = canvas
        self._frame += 1
        return {"canvas": canvas, "frame": self._frame}


class CanvasReader:
    """Whoever reads the events of one answer."""

    def __init__(self) -> None:
        self._attempt = 0
        self._frame = 0
        self.canvas: str | None = None

    def hear(self, data: Mapping[str, Any]) -> bool:
        """Take one `progress` event; return whether it brought the canvas up to date."""
        attempt = data.get("attempt", self._attempt)
        frame, canvas, change = (data.get(name) for name in ("frame", "canvas", "canvas_change"))
        if isinstance(attempt, int) and attempt > self._attempt:
            self._attempt, self._frame, self.canvas = (
                attempt,
                0,
                None,
            )  # what an earlier attempt showed is void
        if attempt != self._attempt:
            return False
        if isinstance(canvas, str):
            if isinstance(frame, int) and frame <= self._frame:
                return False  # sent again
            self.canvas = canvas
            self._frame = (
                frame if isinstance(frame, int) else 0
            )  # without a number: a worker of an earlier release
            return True
        if self.canvas is None or not isinstance(change, Mapping) or frame != self._frame + 1:
            return False
        begin, end, text = (change.get(name) for name in ("from", "to", "text"))
        if not (isinstance(begin, int) and isinstance(end, int) and isinstance(text, str)):
            return False
        if not 0 <= begin <= end <= len(self.canvas):
            return False
        self.canvas, self._frame = self.canvas[:begin] + text + self.canvas[end:], frame
        return True


def difference(before: str, after: str) -> dict[str, Any]:
    """Return the change that makes `after` of `before`: what is between their common beginning and
    their common end.
    """
    begin = _common(before, after)
    rest_before, rest_after = before[begin:], after[begin:]
    tail = _common(rest_before[::-1], rest_after[::-1])
    end = len(before) - tail
    return {"from": begin, "to": end, "text": after[begin : len(after) - tail]}


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning; by halving, as
    comparing slices is fast.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cost(text: str) -> int:
    """Return how many bytes a text takes in an event."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
