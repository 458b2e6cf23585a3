"""Graders and templates: what is right, what is wrong, and what is refused before anything runs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.evaluations.grader_requests import parse_graders
from shared.evaluations.graders import TYPES, Grader, Verdict, outcome_of
from shared.evaluations.templates import MissingColumn, parse_template


def grader(kind: str, **options: Any) -> Grader:
    return parse_graders([{"type": kind, **options}], code_allowed=True)[0]


RIGHT_AND_WRONG: list[tuple[str, dict[str, Any], Any, str, str]] = [
    # type, options, reference, a right answer, a wrong one
    ("exact", {}, "42", " 42\n", "42."),
    ("exact", {}, 42, "42", "4 2"),
    ("normalised", {}, "The Answer", "the answer!", "the answers"),
    ("normalised", {}, "ﬁne  STRASSE", "Fine, Straße", "fine"),
    ("contains", {}, "Paris", "It is Paris.", "it is paris"),
    ("contains", {"ignore_case": True}, "Paris", "it is paris", "it is Rome"),
    (
        "regex",
        {"pattern": r"#### (-?[\d,]+)", "compare": "number"},
        "1234",
        "so\n#### 1,234",
        "so 1,234",
    ),
    ("regex", {"pattern": r"\d+", "which": "first"}, "1", "1 then 2", "2 then 1"),
    ("regex", {"pattern": r"\d+"}, "2", "1 then 2", "2 then 1"),
    ("regex", {"pattern": r"(?P<a>x)(?P<b>y)?", "group": "b"}, "y", "xy", "x"),
    ("regex", {"pattern": r"^yes\b", "reference": None}, "", "yes, sure", "no, yes"),
    ("number", {}, "42", "I think 41, no, 42.0", "42 or 43"),
    ("number", {"which": "first"}, "42", "42 or 43", "41, no, 42"),
    ("number", {"tolerance": 0.5}, 3, "2.5", "2.4"),
    ("number", {"relative": 0.01}, "1,000", "$1,009.5", "1011"),
    ("number", {}, "1e3", "1000", "none at all"),
    (
        "json",
        {},
        '{"a": [1, 2], "b": null}',
        '```json\n{"b": null, "a": [1.0, 2]}\n```',
        '{"a": [2, 1], "b": null}',
    ),
    ("json", {}, {"a": True}, '{"a": true}', '{"a": 1}'),
    ("json", {}, [1], "[1]", "[" * 100_000),
    # Numbers are exact, whatever spelling they have.
    ("number", {}, 2**53 + 1, str(2**53 + 1), str(2**53)),
    ("number", {}, str(2**64), "18,446,744,073,709,551,616", "18446744073709551617"),
    ("number", {}, "0.1", "0.10", "0.1000000000000000055"),
    ("number", {}, "1e30", "1" + 30 * "0", "1" + 29 * "0" + "1"),
    ("number", {"tolerance": 0.1}, 1.0, "1.1", "1.1000000000000000001"),
    ("number", {}, "1e999", "10e998", "1e998"),
    ("json", {}, {"n": 2**53 + 1}, '{"n": 9007199254740993}', '{"n": 9007199254740992}'),
    ("json", {}, [0.1], "[1e-1]", "[0.1000000000000000055]"),
    ("json", {}, "[1e30]", "[1" + 30 * "0" + "]", "[1e31]"),
    ("json", {}, [2**63, -0.0], "[9223372036854775808.0, 0]", "[9223372036854775807, 0]"),
    ("json", {}, "1", "text\n```\n1\n```", "```js\n1\n```"),
    ("choice", {"labels": ["(A)", "is"]}, "(A)", "Answer : ((A)", "answer is"),
    ("choice", {}, "B", "(B)", "C"),
    ("choice", {}, "b", "The answer is B, not A.", "A. Because B is wrong"),
    ("choice", {}, 1, "B. Paris", "A. Paris"),
    ("choice", {"labels": ["yes", "no"]}, "no", "No.", "yes"),
    ("choice", {}, "A", "A) a cat", "a cat is B"),
]


@pytest.mark.parametrize("kind,options,reference,right,wrong", RIGHT_AND_WRONG)
def test_right_and_wrong(
    kind: str, options: dict[str, Any], reference: Any, right: str, wrong: str
) -> None:
    made = grader(kind, **options)
    assert made.grade(right, {"reference": reference}).passed is True
    assert made.grade(wrong, {"reference": reference}).passed is False
    # What is stored is what a client would send: the same grader again.
    again = parse_graders([made.to_json()], code_allowed=True)[0]
    assert again.to_json() == made.to_json()
    assert again.grade(right, {"reference": reference}).passed is True


def test_every_type_is_tested() -> None:
    assert {case[0] for case in RIGHT_AND_WRONG} | {"code"} == set(TYPES)


def test_a_bad_reference_is_nobodys_wrong_answer() -> None:
    for kind, reference, code in (
        ("number", "none", "reference_not_a_number"),
        ("json", "{", "reference_not_json"),
        ("choice", "E", "reference_not_a_label"),
    ):
        verdict = grader(kind).grade("1", {"reference": reference})
        assert (
            verdict.passed is None and verdict.error is not None and verdict.error["code"] == code
        )


def test_a_pattern_that_runs_away_is_stopped_and_said() -> None:
    made = grader("regex", pattern=r"(a|aa)+$")
    began = time.monotonic()
    verdict = made.grade("a" * 80 + "!", {"reference": "a"})
    assert verdict.error is not None and verdict.error["code"] == "regex_timeout"
    assert time.monotonic() - began < 30  # without the limit it would take years
    assert (
        made.grade("ba", {"reference": "a"}).passed is True
    )  # another answer is none the worse for it


def test_an_answer_is_right_when_all_graders_say_so() -> None:
    right, wrong, unsure = (
        Verdict(True),
        Verdict(False),
        Verdict(None, error={"code": "x", "message": "y"}),
    )
    assert outcome_of([right, right]) == "passed"
    assert outcome_of([right, wrong, unsure]) == "failed"
    assert outcome_of([right, unsure]) == "error"


BAD: list[tuple[Any, str, str]] = [
    ("exact", "invalid_parameter", "graders"),
    ([], "invalid_parameter", "graders"),
    ([3], "invalid_parameter", "graders[0]"),
    ([{}], "missing_parameter", "graders[0].type"),
    ([{"type": "guess"}], "invalid_parameter", "graders[0].type"),
    ([{"type": "exact"}, {"type": "exact"}], "invalid_parameter", "graders[1].name"),
    ([{"type": "exact", "pattern": "x"}], "unknown_parameter", "graders[0].pattern"),
    ([{"type": "exact", "reference": None}], "invalid_parameter", "graders[0].reference"),
    ([{"type": "exact", "reference": "{{a b}}"}], "invalid_parameter", "graders[0].reference"),
    ([{"type": "exact"}, {"type": "regex"}], "missing_parameter", "graders[1].pattern"),
    ([{"type": "regex", "pattern": "("}], "invalid_regex", "graders[0].pattern"),
    ([{"type": "regex", "pattern": "x" * 1001}], "invalid_parameter", "graders[0].pattern"),
    ([{"type": "regex", "pattern": "(x)", "group": 2}], "invalid_parameter", "graders[0].group"),
    ([{"type": "regex", "pattern": "(x)", "group": True}], "invalid_parameter", "graders[0].group"),
    (
        [{"type": "regex", "pattern": "x", "compare": "json"}],
        "invalid_parameter",
        "graders[0].compare",
    ),
    ([{"type": "number", "tolerance": -1}], "invalid_parameter", "graders[0].tolerance"),
    ([{"type": "number", "tolerance": "1"}], "invalid_parameter", "graders[0].tolerance"),
    ([{"type": "choice", "labels": ["a", "A"]}], "invalid_parameter", "graders[0].labels"),
    ([{"type": "code"}], "missing_parameter", "graders[0].source"),
    (
        [{"type": "code", "source": "x", "timeout_seconds": 600}],
        "invalid_parameter",
        "graders[0].timeout_seconds",
    ),
]


@pytest.mark.parametrize("value,code,param", BAD)
def test_bad_graders_are_named(value: Any, code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_graders(value, code_allowed=True)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_code_is_off_unless_enabled() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_graders(
            [{"type": "code", "source": "def grade(o, r, i): return True"}], code_allowed=False
        )
    assert (caught.value.code, caught.value.param) == ("code_graders_disabled", "graders[0].type")
    assert "VDIFF_CODE_GRADERS" in caught.value.message


def test_templates() -> None:
    made = parse_template(r"Q: {{ question }} \{{x}} {{meta.level}}/{{list}}", "prompt")
    assert made.columns == ["question", "meta.level", "list"]
    row = {"question": "{{list}}?", "meta": {"level": 3}, "list": [1, "ü"]}
    assert made.text(row) == 'Q: {{list}}? {{x}} 3/[1, "ü"]'  # a column's own braces are text
    assert parse_template("{{meta.level}}", "x").value(row) == 3
    for missing in ("{{answer}}", "{{meta.kind}}", "{{question.x}}"):
        with pytest.raises(MissingColumn) as caught:
            parse_template(missing, "graders[0].reference").text(row)
        assert (
            missing.strip("{}") in caught.value.message
            and "question, meta, list" in caught.value.message
        )
        assert caught.value.param == "graders[0].reference"


@pytest.mark.parametrize("source", ["{{", "{{}}", "{{a b}}", "{{ 1a }}", "{{a}", 3, None])
def test_bad_templates(source: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_template(source, "prompt")
    assert caught.value.param == "prompt"
