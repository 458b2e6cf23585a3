"""Read a number, JSON or a label out of an answer. Pure, and linear in the answer's length.

The answer is a model's text, so a pattern that backtracks would give a model, or the client that
prompts it, a way to hold an API process. Every function here scans a text a constant number of
times. Numbers are exact: 2**53 + 1 is not 2**53.
"""

from __future__ import annotations

import json
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from decimal import Context, Decimal, localcontext
from typing import Any

import regex

from shared.exact_json import json_equal as json_equal

# combining characters in a row that are put in order, as Unicode's stream-safe format has it
MARKS_MAX = 30
BRACKETS_MAX = 16  # in front of a label
_DIGITS = 60  # of a difference that a tolerance is compared with
_JOINER = "\u034f"  # combining grapheme joiner: keeps the marks on its two sides apart
_NUMBER = regex.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?"
)
_SPACES = regex.compile(r"\s*+")
_MARKS = regex.compile(rf"[\p{{M}}\uff9e\uff9f]{{{MARKS_MAX}}}(?=[\p{{M}}\uff9e\uff9f])")
_FENCE, _WORD, _OPENING = "```", "answer", "([*"


def skip_spaces(text: str, at: int) -> int:
    """Return the place of the first character from `at` on that is no white space."""
    end: int = _SPACES.match(text, at).end()
    return end


def normalised(text: str) -> str:
    """Return the text after Unicode NFKC, folded, without punctuation, with single spaces.

    Putting combining marks in order takes a time that is quadratic in the length of a run of them,
    so runs are cut.
    """
    folded = unicodedata.normalize("NFKC", _MARKS.sub(rf"\g<0>{_JOINER}", text)).casefold()
    kept = "".join(" " if unicodedata.category(c)[0] in "PZ" or c.isspace() else c for c in folded)
    return " ".join(kept.split())


def _exact(written: str) -> Decimal | None:
    try:
        return Decimal(written)
    except ArithmeticError:  # an exponent that no computer holds
        return None


def number_in(text: str, *, last: bool = True) -> tuple[Decimal | None, str | None]:
    """Return the last or first number of a text, and how it is written there; commas may separate
    thousands.
    """
    written: str | None = None
    for found in _NUMBER.finditer(text):
        written = found[0]
        if not last:
            break
    return (None, None) if written is None else (_exact(written.replace(",", "")), written)


def is_close(
    one: Decimal, other: Decimal, *, tolerance: float = 0.0, relative: float = 0.0
) -> bool:
    """Return whether two numbers differ by no more than `tolerance`, or `relative` times the larger
    one.
    """
    if one == other or not (tolerance or relative):
        return one == other
    with localcontext(Context(prec=_DIGITS, traps=[])):
        allowed = max(Decimal(repr(relative)) * max(abs(one), abs(other)), Decimal(repr(tolerance)))
        return bool(abs(one - other) <= allowed)


def same_number(left: str, right: str, *, last: bool = True) -> bool:
    """Return whether two texts have equal numbers, as `number_in` reads them."""
    one, other = number_in(left, last=last)[0], number_in(right, last=last)[0]
    return one is not None and one == other


def block_in(text: str) -> str | None:
    """Return the content of the first code block that has no language or says json."""
    at = text.find(_FENCE)
    while at >= 0:
        begin = at + len(_FENCE)
        begin += 4 if text.startswith("json", begin) else 0
        end = skip_spaces(text, begin)
        line = text.rfind("\n", begin, end)
        if line >= 0:
            close = text.find(_FENCE, line + 1)
            return None if close < 0 else text[line + 1 : close]
        at = text.find(_FENCE, at + 1)
    return None


def json_in(text: str) -> Any:
    """Return the answer as JSON, or that of its first code block. Raises ValueError."""
    block = block_in(text)
    try:
        return json.loads(text if block is None else block, parse_float=Decimal)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    except ArithmeticError as exc:
        raise ValueError("a number is out of range") from exc


def choice_in(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that an answer gives.

    It is the whole answer, else what follows the last "answer (is)", else the first label that
    stands alone.
    """
    folded = {label.strip().casefold(): label for label in labels}
    bare = text.strip().strip("().:*[] \n").casefold()
    if bare in folded:
        return folded[bare]
    said = deque(_said(text.casefold(), sorted(folded, key=len, reverse=True)), maxlen=1)
    if said:
        return folded[said[0]]
    # A lone letter in running text is an article more often than a choice: then only its own case,
    # and a mark after it.
    either = "|".join(
        regex.escape(label.strip()) for label in sorted(labels, key=len, reverse=True)
    )
    marked = regex.search(
        rf"(?:^|[\s\(\[\*])({either})(?=[\)\]\.:,\*]|[^\S\n]*+$)", text, regex.MULTILINE
    )
    return None if marked is None else folded[marked[1].casefold()]


def _said(text: str, labels: Sequence[str]) -> Iterator[str]:
    """Give the labels that follow "answer", with "is", a colon and brackets between them or not."""
    at = text.find(_WORD)
    while at >= 0:
        at += len(_WORD)
        label = _label_behind(text, at, labels)
        if label is not None:
            yield label
        at = text.find(_WORD, at)


def _label_behind(text: str, at: int, labels: Sequence[str]) -> str | None:
    at = skip_spaces(text, at)
    first = at + 2 if text.startswith("is", at) else at + 1 if text.startswith(":", at) else at
    for begin in dict.fromkeys((first, at)):
        place = skip_spaces(text, begin)
        behind = skip_spaces(text, place + 1) if text.startswith(":", place) else place
        for start in dict.fromkeys((behind, place)):
            end = start
            while end - start < BRACKETS_MAX and text[end : end + 1] and text[end] in _OPENING:
                end += 1
            for begins in range(end, start - 1, -1):
                for label in labels:
                    if text.startswith(label, begins) and not _is_word(text, begins + len(label)):
                        return label
    return None


def _is_word(text: str, at: int) -> bool:
    character = text[at : at + 1]
    return character.isalnum() or character == "_"
