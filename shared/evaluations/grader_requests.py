"""`graders` of a request, checked: every field is known or refused by its full name
(`graders[0].pattern`). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import regex

from shared import checks
from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.evaluations.graders import COMPARISONS, TYPES, Grader
from shared.evaluations.templates import parse_template

MAX_GRADERS = 10
MAX_NAME = 64
MAX_PATTERN = 1_000
MAX_SOURCE = 50_000
MAX_LABELS = 26
TIMEOUT_SECONDS_MAX = 60.0
MEMORY_MB_MIN, MEMORY_MB_MAX = 64, 2_048
REFERENCE = "{{reference}}"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "normalised": {},
    "contains": {"ignore_case": False},
    "regex": {"pattern": None, "group": None, "which": "last", "compare": "exact"},
    "number": {"tolerance": 0.0, "relative": 0.0, "which": "last"},
    "json": {},
    "choice": {"labels": ["A", "B", "C", "D"]},
    "code": {"source": None, "timeout_seconds": 5.0, "memory_mb": 512, "pass_at": 1.0},
}


class CodeGradersDisabled(InvalidParameter):
    code = "code_graders_disabled"


def parse_graders(
    value: Any, *, code_allowed: bool, memory_mb_max: int = MEMORY_MB_MAX
) -> list[Grader]:
    """Raises InvalidParameter, MissingParameter, UnknownParameter, CodeGradersDisabled.

    Args:
        memory_mb_max: the operator's bound of a grader of code.
    """
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_GRADERS:
        raise InvalidParameter(f"graders must be a list of 1 to {MAX_GRADERS}", param="graders")
    made: list[Grader] = []
    for i, item in enumerate(value):
        grader = _grader(item, f"graders[{i}]", code_allowed=code_allowed)
        if (
            grader.type == "code"
            and item.get("memory_mb") is not None
            and item["memory_mb"] > memory_mb_max
        ):
            message = f"graders[{i}].memory_mb must be from {MEMORY_MB_MIN} to {memory_mb_max} here"
            raise InvalidParameter(message, param=f"graders[{i}].memory_mb")
        if grader.name in (g.name for g in made):
            raise InvalidParameter(
                f"graders[{i}].name: there is another {grader.name!r}", param=f"graders[{i}].name"
            )
        made.append(grader)
    return made


def _grader(item: Any, at: str, *, code_allowed: bool) -> Grader:
    if not isinstance(item, dict):
        raise InvalidParameter(f"{at} must be an object", param=at)
    kind = item.get("type")
    if kind is None:
        raise MissingParameter(f"{at}.type is required", param=f"{at}.type")
    if kind not in TYPES:
        raise InvalidParameter(f"{at}.type must be one of {', '.join(TYPES)}", param=f"{at}.type")
    if kind == "code" and not code_allowed:
        message = f"{at}: graders that run code are off here; the operator turns them on with VDIFF_CODE_GRADERS=true"
        raise CodeGradersDisabled(message, param=f"{at}.type")
    known = ("type", "name", "reference", *_DEFAULTS[kind])
    for name, value in item.items():
        if name not in known and value is not None:
            message = f"{at}.{name[:80]} is not a field of a grader of type {kind}; known: {', '.join(known)}"
            raise UnknownParameter(message, param=f"{at}.{name[:80]}")
    name = kind if item.get("name") is None else item["name"]
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise InvalidParameter(
            f"{at}.name must be a string of 1 to {MAX_NAME} characters", param=f"{at}.name"
        )
    given = {
        **_DEFAULTS[kind],
        **{k: v for k, v in item.items() if k in _DEFAULTS[kind] and v is not None},
    }
    options, pattern = _OPTIONS.get(kind, _plain)(given, at)
    source = item.get("reference", REFERENCE)
    if source is None and kind not in ("regex", "code"):
        raise InvalidParameter(
            f"{at}.reference may be null for regex and code alone", param=f"{at}.reference"
        )
    reference = None if source is None else parse_template(source, f"{at}.reference")
    return Grader(name, kind, reference, options, pattern)


def _plain(given: dict[str, Any], at: str) -> tuple[dict[str, Any], None]:
    return given, None


def _contains(given: dict[str, Any], at: str) -> tuple[dict[str, Any], None]:
    if not isinstance(given["ignore_case"], bool):
        raise InvalidParameter(f"{at}.ignore_case must be true or false", param=f"{at}.ignore_case")
    return given, None


def _one_of(given: Mapping[str, Any], name: str, at: str, choices: tuple[str, ...]) -> None:
    if given[name] not in choices:
        raise InvalidParameter(
            f"{at}.{name} must be one of {', '.join(choices)}", param=f"{at}.{name}"
        )


def _number_of(given: Mapping[str, Any], name: str, at: str, low: float, high: float) -> float:
    return checks.number(given[name], f"{at}.{name}", low, high)


def _string(given: Mapping[str, Any], name: str, at: str, longest: int) -> str:
    value = given[name]
    if value is None:
        raise MissingParameter(f"{at}.{name} is required", param=f"{at}.{name}")
    if not isinstance(value, str) or not 1 <= len(value) <= longest:
        raise InvalidParameter(
            f"{at}.{name} must be a string of 1 to {longest} characters", param=f"{at}.{name}"
        )
    return value


def _regex(given: dict[str, Any], at: str) -> tuple[dict[str, Any], Any]:
    source = _string(given, "pattern", at, MAX_PATTERN)
    _one_of(given, "which", at, ("last", "first"))
    _one_of(given, "compare", at, tuple(COMPARISONS))
    try:
        pattern = regex.compile(source)
    except (regex.error, RecursionError, OverflowError, ValueError) as exc:
        message = f"{at}.pattern is no regular expression: {exc}"
        raise InvalidParameter(message, param=f"{at}.pattern", code="invalid_regex") from exc
    group = given["group"]
    if group is None:
        group = 1 if pattern.groups else 0
    fits = (
        group in pattern.groupindex
        if isinstance(group, str)
        else type(group) is int and 0 <= group <= pattern.groups
    )
    if not fits:
        raise InvalidParameter(
            f"{at}.group: the pattern has no group {group!r}", param=f"{at}.group"
        )
    return {**given, "group": group}, pattern


def _number(given: dict[str, Any], at: str) -> tuple[dict[str, Any], None]:
    _one_of(given, "which", at, ("last", "first"))
    for name in ("tolerance", "relative"):
        given[name] = _number_of(given, name, at, 0.0, math.inf if name == "tolerance" else 1.0)
        if math.isinf(given[name]):
            raise InvalidParameter(f"{at}.{name} must be finite", param=f"{at}.{name}")
    return given, None


def _choice(given: dict[str, Any], at: str) -> tuple[dict[str, Any], None]:
    labels, where = given["labels"], f"{at}.labels"
    if not isinstance(labels, list) or not 2 <= len(labels) <= MAX_LABELS:
        raise InvalidParameter(f"{where} must be a list of 2 to {MAX_LABELS} strings", param=where)
    if any(
        not isinstance(label, str) or not 1 <= len(label.strip()) <= MAX_NAME for label in labels
    ):
        raise InvalidParameter(
            f"{where}: each is a string of 1 to {MAX_NAME} characters", param=where
        )
    if len({label.casefold() for label in labels}) != len(labels):
        raise InvalidParameter(f"{where}: two labels are the same", param=where)
    return {"labels": list(labels)}, None


def _code(given: dict[str, Any], at: str) -> tuple[dict[str, Any], None]:
    _string(given, "source", at, MAX_SOURCE)
    given["timeout_seconds"] = _number_of(given, "timeout_seconds", at, 0.1, TIMEOUT_SECONDS_MAX)
    given["memory_mb"] = int(_number_of(given, "memory_mb", at, MEMORY_MB_MIN, MEMORY_MB_MAX))
    given["pass_at"] = _number_of(given, "pass_at", at, 0.0, 1.0)
    return given, None


_OPTIONS: dict[str, Any] = {
    "contains": _contains,
    "regex": _regex,
    "number": _number,
    "choice": _choice,
    "code": _code,
}
