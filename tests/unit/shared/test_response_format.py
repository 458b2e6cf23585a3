"""`response_format` at submission: OpenAI's shapes; a schema that cannot be enforced is refused by
place and keyword.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from shared.endless_schema import is_endless
from shared.errors import VDiffError
from shared.response_format import response_format_of

BASE = "response_format.json_schema.schema"


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value, **more}}


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        made = {"type": "array", "items": made}
    return made


def test_openais_shapes() -> None:
    assert response_format_of({"type": "text"}) is None
    assert response_format_of({"type": "json_object"}) == {"type": "json_object"}
    given = schema(
        {"type": "object", "title": "T", "properties": {"not": {"type": "string"}}},
        strict=True,
        description="d",
    )
    assert response_format_of(given) == given
    assert response_format_of(schema({}, strict=None)) is not None


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ("json", "response_format", "object"),
        ({}, "response_format.type", "one of"),
        ({"type": "xml"}, "response_format.type", "one of"),
        ({"type": "json_object", "x": 1}, "response_format.x", "not supported"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (schema({}, name=""), "response_format.json_schema.name", "characters"),
        (schema([]), BASE, "object"),
        (schema({}, strict="yes"), "response_format.json_schema.strict", "true or false"),
        (schema({}, colour=1), "response_format.json_schema.colour", "not supported"),
        (schema({"not": {}}), f"{BASE}.not", "'not'"),
        (schema({"requird": []}), f"{BASE}.requird", "'requird'"),
        (schema({"x-guidance": {"lenient": True}}), f"{BASE}.x-guidance", "cannot be enforced"),
        (
            schema({"properties": {"a": {"items": {"not": {}}}}}),
            f"{BASE}.properties.a.items.not",
            "'not'",
        ),
        (schema({"anyOf": [{}, {"if": {}}]}), f"{BASE}.anyOf[1].if", "'if'"),
        (schema({"type": "objct"}), BASE, "objct"),
        (schema({"type": "string", "format": "nope"}), BASE, "nope"),
        (schema({"type": "string", "pattern": "(?=a)"}), BASE, "look-around"),
        (schema({"$ref": "https://example.com/x.json"}), BASE, "example.com"),
        (schema({"oneOf": [{"type": "object"}, {"type": "object"}]}), BASE, "oneOf"),
        (schema({"minimum": 5, "maximum": 3, "type": "integer"}), BASE, "Unsatisfiable"),
        (schema(nested(70)), BASE, "deeper"),
        (schema({"enum": ["x" * 70_000]}), BASE, "longer"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(value: Any, param: str, said: str) -> None:
    with pytest.raises(VDiffError, match=said) as wrong:
        response_format_of(value)
    assert (wrong.value.param, wrong.value.http_status) == (param, 400)


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
PAIR = {
    "a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "minItems": 1},
    "b": {
        "allOf": [
            {"type": "object"},
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/a"}, "minProperties": 1},
        ]
    },
}


@pytest.mark.parametrize(
    "value",
    [
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"$ref": "#"}},
            "required": ["a", "b"],
        },
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"$ref": "#/$defs/a", "$defs": PAIR},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": PAIR},
    ],
)
def test_a_schema_that_no_finite_answer_satisfies_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(VDiffError, match="without end") as wrong:
        response_format_of(schema(value))
    assert wrong.value.param == BASE


@pytest.mark.parametrize(
    "value",
    [
        {
            "type": "object",
            "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
            "required": ["next"],
        },
        {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 0},
        {
            "type": "object",
            "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}},
            "required": [],
        },
        {"$ref": "#/$defs/node", "$defs": {"node": {**NODE, "required": []}}},
        {"$ref": "#/$defs/a", "$defs": {**PAIR, "b": {"enum": [1]}}},
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}],
            "items": {"$ref": "#"},
            "minItems": 1,
        },
    ],
)
def test_a_recursion_that_can_end_is_enforced(value: dict[str, Any]) -> None:
    assert response_format_of(schema(value)) == schema(value)


def test_the_check_needs_no_torch_and_llguidance_only_when_asked() -> None:
    code = (
        "import sys, json; import shared.response_format as r; first = 'llguidance' in sys.modules;"
        "r.response_format_of({'type': 'json_object'});"
        "print(json.dumps([first, 'llguidance' in sys.modules, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, False]


def test_whether_a_deep_schema_ends_takes_no_longer_than_reading_it() -> None:
    """Each level was once looked at twice, so that sixty of them took for ever."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        schema = {
            "type": "object",
            "properties": {"a": schema},
            "required": ["a"],
            "additionalProperties": False,
        }
    assert not is_endless(schema)
