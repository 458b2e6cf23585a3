"""Numbers in a JSON schema that a grammar cannot follow exactly, by the path of their keyword.
Pure.

llguidance computes with doubles: it takes 2**53 + 1 for 2**53 and would write that, so such a
schema is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shared.strict_json import Inexact

EXACT_MAX = 2**53  # up to here, every integer is a double
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "additionalItems")


def bounds_of(schema: Any, at: str) -> Iterator[tuple[str, str, Any]]:
    """Give the path, keyword and value of each bound of numbers, innermost schemas included."""
    for path, inner in schemas_in(schema, at):
        for keyword in _BOUNDS:
            if keyword in inner:
                yield f"{path}.{keyword}", keyword, inner[keyword]


def inexact_number(schema: Any, at: str) -> tuple[str, str] | None:
    """Return the path and the spelling of a number that cannot be enforced exactly, or None."""
    for path, inner in schemas_in(schema, at):
        for keyword in (*_BOUNDS, *_COUNTS, "const", "enum"):
            if keyword in inner:
                for place, number in _numbers(inner[keyword], f"{path}.{keyword}"):
                    if isinstance(number, Inexact):
                        return place, number.written
                    if abs(number) > EXACT_MAX:
                        return place, str(number)
    return None


def schemas_in(schema: Any, at: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give each schema inside a schema with its path, itself first."""
    waiting: list[tuple[str, Any]] = [(at, schema)]
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, Mapping):
            continue
        yield path, node
        for keyword, value in node.items():
            if keyword in _MAPS and isinstance(value, Mapping):
                waiting += [
                    (f"{path}.{keyword}.{name[:80]}", inner) for name, inner in value.items()
                ]
            elif keyword in _LISTS and isinstance(value, list):
                waiting += [(f"{path}.{keyword}[{i}]", inner) for i, inner in enumerate(value)]
            elif keyword in _SINGLE:
                waiting.append((f"{path}.{keyword}", value))


def _numbers(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Give each number inside a value, with its path."""
    waiting = [(at, value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield path, item
        elif isinstance(item, list):
            waiting += [(f"{path}[{i}]", inner) for i, inner in enumerate(item)]
        elif isinstance(item, Mapping):
            waiting += [(f"{path}.{name[:80]}", inner) for name, inner in item.items()]
