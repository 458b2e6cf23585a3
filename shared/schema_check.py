"""Validation of a finished answer against its JSON schema, with exact numbers. Pure.

The grammar has forced the answer into the schema token by token; this check does not share its code
or its arithmetic. It leaves `pattern`, `patternProperties` and `format` to the grammar: a client's
pattern must not run over a model's text.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from decimal import Context, Decimal, localcontext
from typing import Any

from shared.endless_schema import target_of
from shared.exact_json import json_equal

STEPS_MAX = 200_000  # schemas that are tried on one answer; beyond, the rest is taken as it is
DEPTH_MAX = 200
_DIGITS = 1_000  # of a quotient


_BOUNDS: dict[str, Callable[[Decimal, Decimal], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}


class _TooMuch(Exception):
    """The check takes more steps than it is worth."""


def violation(schema: Any, text: str) -> str | None:
    """Return what is wrong with an answer, with its path in the answer, or None."""
    try:
        value = json.loads(text, parse_float=Decimal)
    except (ValueError, ArithmeticError, RecursionError) as exc:
        return f"the answer is not JSON: {exc}"
    try:
        return _Check(schema).run(schema, value, "answer", 0)
    except (_TooMuch, ArithmeticError):  # a number of more digits than the check computes with
        return None


class _Check:
    def __init__(self, root: Any) -> None:
        self._root, self._left = root, STEPS_MAX

    def run(self, schema: Any, value: Any, at: str, depth: int) -> str | None:
        self._left -= 1
        if self._left < 0 or depth > DEPTH_MAX:
            raise _TooMuch
        if not isinstance(schema, Mapping):
            return f"{at} is not allowed" if schema is False else None
        if "$ref" in schema and (
            wrong := self.run(target_of(self._root, schema["$ref"]), value, at, depth + 1)
        ):
            return wrong
        return (
            self._own(schema, value, at)
            or self._combined(schema, value, at, depth)
            or self._inner(schema, value, at, depth)
        )

    def _combined(self, schema: Mapping[str, Any], value: Any, at: str, depth: int) -> str | None:
        for inner in schema.get("allOf", ()):
            if wrong := self.run(inner, value, at, depth + 1):
                return wrong
        if "anyOf" in schema and all(
            self.run(inner, value, at, depth + 1) for inner in schema["anyOf"]
        ):
            return f"{at} fits none of anyOf"
        if "oneOf" in schema:
            fits = sum(self.run(inner, value, at, depth + 1) is None for inner in schema["oneOf"])
            if fits != 1:
                return f"{at} fits {fits} of oneOf"
        return None

    @staticmethod
    def _own(schema: Mapping[str, Any], value: Any, at: str) -> str | None:
        """Check what a schema says of the value itself."""
        kinds = schema.get("type")
        if kinds is not None and not any(
            _is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)
        ):
            return f"{at} is not of type {kinds}"
        if "const" in schema and not json_equal(value, schema["const"]):
            return f"{at} is not const"
        if "enum" in schema and not any(json_equal(value, one) for one in schema["enum"]):
            return f"{at} is none of enum"
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return _number(schema, Decimal(value), at)
        for kind, name in ((str, "Length"), (list, "Items"), (dict, "Properties")):
            if isinstance(value, kind):
                least, most = schema.get(f"min{name}", 0), schema.get(f"max{name}")
                if len(value) < least or (most is not None and len(value) > most):
                    return f"{at} has {len(value)}: min{name} is {least}, max{name} {most}"
        return None

    def _inner(self, schema: Mapping[str, Any], value: Any, at: str, depth: int) -> str | None:
        """Check the parts of an object or a list."""
        if isinstance(value, dict):
            given, others = schema.get("properties", {}), schema.get("additionalProperties", True)
            for name in schema.get("required", ()):
                if name not in value:
                    return f"{at} lacks {name}"
            for name, item in value.items():
                inner = given.get(name, True if "patternProperties" in schema else others)
                if wrong := self.run(inner, item, f"{at}.{name[:80]}", depth + 1):
                    return wrong
        if isinstance(value, list):
            items = schema.get("items", True)
            first = items if isinstance(items, list) else schema.get("prefixItems", [])
            rest = schema.get("additionalItems", True) if isinstance(items, list) else items
            for i, item in enumerate(value):
                if wrong := self.run(
                    first[i] if i < len(first) else rest, item, f"{at}[{i}]", depth + 1
                ):
                    return wrong
        return None


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
        return is_number and (
            kind == "number" or isinstance(value, int) or value == value.to_integral_value()
        )
    types: dict[str, Any] = {
        "null": type(None),
        "boolean": bool,
        "string": str,
        "array": list,
        "object": dict,
    }
    return isinstance(value, types.get(kind, object))


def _number(schema: Mapping[str, Any], value: Decimal, at: str) -> str | None:
    for keyword, holds in _BOUNDS.items():
        if keyword in schema and not holds(value, _exact(schema[keyword])):
            return f"{at} is {str(value)[:40]}: {keyword} is {schema[keyword]}"
    if "multipleOf" in schema:
        with localcontext(Context(prec=_DIGITS)):
            if value % _exact(schema["multipleOf"]) != 0:
                return f"{at} is {str(value)[:40]}: multipleOf is {schema['multipleOf']}"
    return None


def _exact(value: Any) -> Decimal:
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
