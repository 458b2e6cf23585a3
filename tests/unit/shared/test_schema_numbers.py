"""Numbers in a schema are enforced exactly or refused with the path of their keyword; finished
answers are checked again.
"""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from shared.errors import InvalidParameter
from shared.response_format import grammar_of, response_format_of
from shared.schema_check import violation
from shared.strict_json import parse_json

BYTES = LLTokenizer("byte")
SCHEMA = "response_format.json_schema.schema"


def submitted(schema: str) -> dict[str, Any]:
    """The schema as a client's body brings it. Raises InvalidParameter."""
    raw = f'{{"type": "json_schema", "json_schema": {{"name": "n", "schema": {schema}}}}}'
    made = response_format_of(parse_json(raw.encode()))
    assert made is not None
    found: dict[str, Any] = made["json_schema"]["schema"]
    return found


def accepts(schema: Any, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar_of(schema), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    matcher.consume_tokens(tokens)
    return bool(matcher.is_accepting())


def holds(keyword: str, bound: Decimal, value: Decimal) -> bool:
    return {
        "enum": value == bound,
        "const": value == bound,
        "minimum": value >= bound,
        "maximum": value <= bound,
        "exclusiveMinimum": value > bound,
        "exclusiveMaximum": value < bound,
        "multipleOf": bound != 0 and value % bound == 0,
    }[keyword]


NUMBERS = (
    "7",
    "-0",
    "-0.0",
    "0.1",
    "0.10",
    "1e-7",
    "1.5e3",
    "1e15",
    "1e30",
    "-1e30",
    "0.1000000000000000055",
    "0.30000000000000004",
    *(
        str(sign * (2**power + more))
        for power in (53, 63, 64)
        for more in (-1, 0, 1)
        for sign in (1, -1)
    ),
    "1" + "0" * 30,
    "12345678901234567890.5",
    "1" * 400,
)


@pytest.mark.parametrize(
    "keyword", ["enum", "const", "minimum", "maximum", "exclusiveMinimum", "multipleOf"]
)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_is_exact_or_refused_by_its_path(number: str, keyword: str) -> None:
    value = f"[true, {number}]" if keyword == "enum" else number
    kind = '"type": "number", ' if keyword not in ("enum", "const") else ""
    try:
        schema = submitted(
            f'{{"type": "object", "properties": {{"v": {{{kind}"{keyword}": {value}}}}}}}'
        )
    except InvalidParameter as exc:
        assert exc.param is not None and exc.param.startswith(f"{SCHEMA}.properties.v.{keyword}")
        assert abs(Decimal(number)) > 2**53 or len(number) > 15 or keyword == "multipleOf"
        return
    inner, bound = schema["properties"]["v"], Decimal(number)
    for near in {
        bound,
        bound + 1,
        bound - 1,
        bound + Decimal("0.5"),
        bound * 2,
        bound * Decimal("1.0001"),
    }:
        text = format(near.normalize(), "f")
        text = text.removeprefix("-") if near == 0 else text
        if accepts(inner, text):
            assert holds(keyword, bound, Decimal(text)), text
            assert violation(inner, text) is None
        elif not holds(keyword, bound, Decimal(text)):
            assert violation(inner, text) is not None
    if keyword in ("enum", "const"):
        assert accepts(inner, "0" if bound == 0 else format(bound.normalize(), "f"))


def test_numbers_deep_inside_are_found() -> None:
    big = 2**53 + 1
    for schema, path in (
        ({"anyOf": [{"const": 1}, {"const": {"a": [big]}}]}, "anyOf[1].const.a[0]"),
        ({"$defs": {"x": {"items": {"maximum": big}}}}, "$defs.x.items.maximum"),
        ({"type": "array", "maxItems": big}, "maxItems"),
        ({"type": "string", "maxLength": 2**64}, "maxLength"),
    ):
        with pytest.raises(InvalidParameter) as caught:
            submitted(json.dumps(schema))
        assert caught.value.param == f"{SCHEMA}.{path}"


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {
        "type": "object",
        "required": ["b"],
        "additionalProperties": False,
        "minProperties": 1,
        "properties": {
            "a": {"type": ["integer", "null"], "minimum": -3, "maximum": 12},
            "b": {"enum": ["x", 1, [2], 0.5]},
        },
    },
    {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "minItems": 1,
        "maxItems": 3,
    },
    {
        "type": "array",
        "prefixItems": [{"const": "a"}, {"type": "boolean"}],
        "items": {"type": "integer", "multipleOf": 5},
    },
    {
        "anyOf": [
            {"type": "string", "maxLength": 3},
            {"allOf": [{"type": "integer"}, {"minimum": 7}]},
        ]
    },
    {"oneOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]+$"}]},
    {
        "$ref": "#/$defs/t",
        "$defs": {
            "t": {
                "type": "object",
                "properties": {
                    "n": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}
                },
                "additionalProperties": False,
            }
        },
    },
    {
        "type": "object",
        "patternProperties": {"^k": {"type": "integer"}},
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_the_grammar_writes_is_valid(number: int) -> None:
    """The check refuses nothing that the grammar lets through: 40 random walks."""
    schema = submitted(json.dumps(SCHEMAS[number]))
    grammar, drawn, finished = grammar_of(schema), random.Random(number), 0
    for _ in range(40):
        matcher = LLMatcher(BYTES, grammar, log_level=0)
        written = b""
        for _ in range(120):
            if matcher.is_accepting() and (matcher.is_stopped() or drawn.random() < 0.3):
                break
            mask = matcher.compute_bitmask()
            allowed = [t for t in (*range(0x20, 0x7F),) if mask[t // 8] >> t % 8 & 1]
            if not allowed:
                break
            closing = [t for t in allowed if chr(t) in '"]}']
            token = drawn.choice(closing if closing and drawn.random() < 0.5 else allowed)
            matcher.consume_token(token)
            written += bytes([token])
        if matcher.is_accepting():
            finished += 1
            assert violation(schema, written.decode()) is None, written
    assert finished >= 5


WRONG: list[tuple[Any, str, str]] = [
    ({"type": "integer"}, "1.5", "type"),
    ({"type": "object"}, "[]", "type"),
    ({"const": 2**53 + 1}, str(2**53), "const"),
    ({"minimum": 2**53 + 1}, str(2**53), "minimum"),
    ({"multipleOf": 0.1}, "0.15", "multipleOf"),
    ({"maxLength": 1}, '"ab"', "maxLength"),
    ({"required": ["a"]}, "{}", "lacks a"),
    ({"properties": {"a": {"items": {"enum": [1]}}}}, '{"a": [1, 2]}', "answer.a[1]"),
    ({"additionalProperties": False}, '{"x": 1}', "answer.x"),
    ({"anyOf": [{"type": "null"}]}, "1", "anyOf"),
    ({"oneOf": [{}, True]}, "1", "2 of oneOf"),
    ({"allOf": [{"type": "null"}]}, "1", "type"),
    (False, "1", "not allowed"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, "1", "type"),
    ({"type": "object"}, "{", "not JSON"),
]


@pytest.mark.parametrize("schema,text,reason", WRONG)
def test_a_wrong_answer_is_told(schema: Any, text: str, reason: str) -> None:
    found = violation(schema, text)
    assert found is not None and reason in found


def test_the_check_is_bounded() -> None:
    schema: dict[str, Any] = {"$defs": {"x0": {"type": "null"}}, "$ref": "#/$defs/x40"}
    for i in range(40):
        schema["$defs"][f"x{i + 1}"] = {"anyOf": [{"$ref": f"#/$defs/x{i}"}] * 2}
    assert violation(schema, "1") is None  # 2**40 steps: given up
    assert violation({"$ref": "#"}, "1") is None
