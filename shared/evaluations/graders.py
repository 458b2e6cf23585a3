"""Graders: what makes an answer right. Pure, but for `code`, which is run by
`shared.evaluations.sandbox`.

    exact        the answer is the reference (spaces at the ends do not count)
    normalised   the same after Unicode NFKC, lower case, without punctuation, spaces as one
    contains     the reference is in the answer
    regex        a pattern takes a part out of the answer, which is compared; without a reference a
                 match is enough
    number       the last (or first) number of the answer, within a tolerance
    json         the answer, or the code block in it, is JSON equal to the reference; the order of
                 keys does not count
    choice       the label that the answer chooses
    code         your own `grade(output, reference, item)`, in a sandbox

A verdict is yes, no, or an error that says why the grader could not tell (`regex_timeout`,
`grader_timeout`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.evaluations.extraction import (
    choice_in,
    is_close,
    json_equal,
    json_in,
    normalised,
    number_in,
    same_number,
)
from shared.evaluations.templates import Template
from shared.strict_json import storable

REGEX_SECONDS = 1.0  # for one answer
PASSED, FAILED, ERROR = (
    "passed",
    "failed",
    "error",
)  # outcomes; sorted, what needs a look comes first
SHOWN = 500  # characters of what was taken out of an answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one grader about one answer."""

    passed: bool | None  # None: it could not tell, and `error` says why
    extracted: str | None = None  # what it compared, when that is not the whole answer
    score: float | None = None  # of `code` alone
    error: dict[str, str] | None = None  # {code, message}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that can be stored, whatever characters foreign code put into a
        message.
        """
        made: dict[str, Any] = {"passed": self.passed}
        if self.extracted is not None:
            made["extracted"] = self.extracted[:SHOWN]
        if self.score is not None:
            made["score"] = self.score
        if self.error is not None:
            made["error"] = self.error
        return made | {
            name: storable(made[name]) for name in ("extracted", "error") if name in made
        }


def failed(code: str, message: str) -> Verdict:
    return Verdict(None, error={"code": code, "message": message[:SHOWN]})


def same(left: str, right: str) -> bool:
    return left.strip() == right.strip()


COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    "exact": same,
    "normalised": lambda a, b: normalised(a) == normalised(b),
    "number": same_number,
}


@dataclass(frozen=True, slots=True)
class Grader:
    """One checked grader; `options` are those of its type, complete."""

    name: str
    type: str
    reference: Template | None
    options: Mapping[str, Any]
    pattern: Any = None  # of `regex`, compiled

    def to_json(self) -> dict[str, Any]:
        """Return the object that a client would write."""
        reference = None if self.reference is None else self.reference.source
        return {"name": self.name, "type": self.type, "reference": reference, **self.options}

    def grade(self, output: str, row: Mapping[str, Any]) -> Verdict:
        """For any thread; not for `code`."""
        return _BY_TYPE[self.type](
            self, output, None if self.reference is None else self.reference.value(row), row
        )


def _text(reference: Any) -> str:
    return reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)


def _exact(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    return Verdict(same(output, _text(reference)))


def _normalised(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    return Verdict(normalised(output) == normalised(_text(reference)))


def _contains(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    wanted = _text(reference)
    if grader.options["ignore_case"]:
        output, wanted = output.casefold(), wanted.casefold()
    return Verdict(wanted in output)


def _regex(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    options = grader.options
    try:
        # concurrent: without the interpreter's lock, which requests need meanwhile
        matches = grader.pattern.finditer(output, timeout=REGEX_SECONDS, concurrent=True)
        wanted = matches if options["which"] == "first" else iter(deque(matches, maxlen=1))
        found = next(wanted, None)
    except TimeoutError:
        message = f"the pattern took longer than {REGEX_SECONDS:g} s on this answer; it may backtrack without end"
        return failed("regex_timeout", message)
    taken = None if found is None else found[options["group"]]
    if taken is None:
        return Verdict(False)
    return Verdict(
        reference is None or COMPARISONS[options["compare"]](taken, _text(reference)), taken
    )


def _number(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    options = grader.options
    wanted, _ = number_in(_text(reference), last=options["which"] == "last")
    if wanted is None:
        return failed(
            "reference_not_a_number", f"the reference {_text(reference)[:100]!r} has no number"
        )
    got, written = number_in(output, last=options["which"] == "last")
    if got is None:
        return Verdict(False)
    return Verdict(
        is_close(got, wanted, tolerance=options["tolerance"], relative=options["relative"]), written
    )


def _json(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    if isinstance(reference, str):
        try:
            reference = json_in(reference)
        except ValueError as exc:
            return failed("reference_not_json", f"the reference is not JSON: {exc}")
    try:
        return Verdict(json_equal(json_in(output), reference))
    except ValueError:
        return Verdict(False)


def _choice(grader: Grader, output: str, reference: Any, row: Mapping[str, Any]) -> Verdict:
    labels = grader.options["labels"]
    if (
        isinstance(reference, int)
        and not isinstance(reference, bool)
        and str(reference) not in labels
    ):
        wanted: str | None = labels[reference] if 0 <= reference < len(labels) else None
    else:
        wanted = next(
            (label for label in labels if label.casefold() == _text(reference).strip().casefold()),
            None,
        )
    if wanted is None:
        return failed(
            "reference_not_a_label",
            f"the reference {_text(reference)[:100]!r} is none of {', '.join(labels)}",
        )
    got = choice_in(output, labels)
    return Verdict(got == wanted, got)


_BY_TYPE: dict[str, Callable[[Grader, str, Any, Mapping[str, Any]], Verdict]] = {
    "exact": _exact,
    "normalised": _normalised,
    "contains": _contains,
    "regex": _regex,
    "number": _number,
    "json": _json,
    "choice": _choice,
}
TYPES = (*_BY_TYPE, "code")


def outcome_of(verdicts: Sequence[Verdict]) -> str:
    """Return the outcome of an answer: passed if every grader passes it; error if a grader failed
    and none found it wrong.
    """
    if any(v.passed is False for v in verdicts):
        return FAILED
    return ERROR if any(v.passed is None for v in verdicts) else PASSED
