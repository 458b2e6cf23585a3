"""Steps of extraction grow in proportion to an answer's length. Steps are counted, so that a busy
machine does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import regex

from shared.evaluations import extraction
from shared.evaluations.extraction import block_in, choice_in, normalised


class Counted(str):
    """A text that counts the characters which its methods look at."""

    looked = 0

    def find(self, sub: str, start: Any = 0, end: Any = None) -> int:
        found = super().find(sub, start)
        Counted.looked += (found if found >= 0 else len(self)) - min(start, len(self)) + len(sub)
        return found

    def rfind(self, sub: str, start: Any = 0, end: Any = None) -> int:
        Counted.looked += end - start
        return super().rfind(sub, start, end)

    def casefold(self) -> Counted:
        Counted.looked += len(self)
        return Counted(super().casefold())


def work(monkeypatch: pytest.MonkeyPatch, function: Callable[[str], Any], text: str) -> int:
    """Characters that were looked at, and lines that were executed."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += 1
        return trace

    def skip_spaces(text: str, at: int) -> int:
        end = at
        while end < len(text) and text[end].isspace():
            end += 1
            Counted.looked += 1
        return end

    monkeypatch.setattr(extraction, "skip_spaces", skip_spaces)
    Counted.looked = 0
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(Counted(text))
    finally:
        sys.settrace(before)
    return lines + Counted.looked


HARD: list[tuple[Callable[[str], Any], str]] = [
    (block_in, "```" + "\n" * 500),
    (block_in, "```\n" * 300 + "``"),
    (block_in, "`" * 1000),
    (block_in, "```json " * 300),
    (lambda text: choice_in(text, ["A", "B"]), "answer" + " " * 1000),
    (lambda text: choice_in(text, ["A", "B"]), "answer is : " * 200),
    (lambda text: choice_in(text, ["A", "B"]), "answer" + "(" * 1000),
    (lambda text: choice_in(text, ["A", "B"]), "A" + "\n \t" * 400 + "x"),
    (lambda text: choice_in(text, ["A", "B"]), "(A" * 500),
]


@pytest.mark.parametrize("case", range(len(HARD)))
def test_work_grows_with_the_length(monkeypatch: pytest.MonkeyPatch, case: int) -> None:
    function, text = HARD[case]
    once, four = work(monkeypatch, function, text), work(monkeypatch, function, text * 4)
    assert four <= 4 * once + 500


def test_runs_of_combining_marks_are_cut() -> None:
    """Putting n marks in order takes n**2 steps, so no run that is longer than 31 reaches
    `normalize`.
    """
    for marks in ("\u0301\u0316", "\uff9e\u0316", "\u0345\u0344\u0316"):
        seen: list[str] = []

        def normalize(form: str, text: str, seen: list[str] = seen) -> str:
            seen.append(text)
            return text

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extraction.unicodedata, "normalize", normalize)
            normalised("a" + marks * 2_000)
        longest = max(
            len(run[0])
            for run in regex.finditer(r"[\p{M}\uff9e\uff9f]+", seen[0].replace("\u034f", "a"))
        )
        assert longest <= extraction.MARKS_MAX + 1
    # Short runs are put in order as ever.
    assert normalised("a\u0301\u0316") == normalised("a\u0316\u0301") == "\u00e1\u0316"


def test_the_patterns_that_are_left_cannot_backtrack_over_spaces() -> None:
    """The pattern of a label that stands alone looks at each character once: it finishes on what
    took a square of steps.
    """
    assert choice_in("A" + " " * 2_000_000 + "x", ["A", "B"]) is None
    assert block_in("```" + "\n" * 2_000_000) is None
    assert choice_in("answer" + " " * 2_000_000, ["A", "B"]) is None
