"""OpenAI's `response_format`: which formats there are, which schemas can be enforced, what fits
beside them. No torch.

`json_object` and `json_schema` are enforced token by token while an answer is decoded
(`worker.engine.structured`), so a schema that the grammar library cannot follow exactly is refused
here, by the place and the name of the keyword. llguidance is imported when it is first needed: it
comes with the extras `api` and `worker`, and neither needs it otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from shared import checks
from shared.algorithms import UNIFORM
from shared.endless_schema import is_endless
from shared.errors import ConfigurationError, InvalidParameter, MissingParameter, UnknownParameter
from shared.model_card import ModelCard
from shared.schema_numbers import bounds_of, inexact_number

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

PARAM = "response_format"
LEFT_TO_RIGHT = ("sequential", "threshold")
"""The algorithms that can follow a grammar; the first is the default. A grammar says what may follow a beginning, so
answers are committed from left to right: by `sequential` as ever, by `threshold` as far as the model is sure."""

MAX_SCHEMA_BYTES = 65_536
MAX_DEPTH = 64
MAX_NAME = 64
MAX_BOUNDS = 100  # that are tried one by one to name the one that was refused
# One way of writing: the separators are forced, so they cost no choice, and no model can fill its
# answer with blanks.
STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

_KEYWORDS = frozenset(
    {
        "type",
        "enum",
        "const",
        "anyOf",
        "allOf",
        "oneOf",
        "$ref",
        "properties",
        "patternProperties",
        "additionalProperties",
        "required",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "$defs",
        "definitions",
    }
)
_ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "$anchor",
    }
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_ENDS = "the format decides where the answer ends"
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")


def response_format_of(value: Any) -> dict[str, Any] | None:
    """The format, checked; None for plain text.

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the place inside
            `response_format`.
    """
    if not isinstance(value, Mapping):
        raise InvalidParameter(f"{PARAM} must be an object with a type", param=PARAM)
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidParameter(
            f"{PARAM}.type must be one of text, json_object, json_schema", param=f"{PARAM}.type"
        )
    _only(value, ("type", "json_schema") if kind == "json_schema" else ("type",), PARAM)
    if kind == "text":
        return None
    if kind == "json_schema":
        _named_schema(value.get("json_schema"))
    where = f"{PARAM}.json_schema.schema"
    inexact = inexact_number(schema_of(value), where)
    if inexact is not None:
        path, number = inexact
        raise InvalidParameter(
            f"{path}: {number} cannot be enforced exactly; numbers have at most 15 digits and are within +-2**53",
            param=path,
        )
    wrong = _refusal(json.dumps(schema_of(value), sort_keys=False))
    if wrong is not None:
        where = _culprit(schema_of(value), where)
        raise InvalidParameter(f"{where} cannot be enforced: {wrong}", param=where)
    return dict(value)


def schema_of(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema that the answer has to match."""
    if response_format["type"] == "json_object":
        return {"type": "object"}
    schema: dict[str, Any] = response_format["json_schema"]["schema"]
    return schema


def _only(value: Mapping[str, Any], known: tuple[str, ...], at: str) -> None:
    for name in value:
        if name not in known:
            param = f"{at}.{str(name)[:80]}"
            raise UnknownParameter(
                f"{param} is not supported; known here: {', '.join(known)}", param=param
            )


def _named_schema(given: Any) -> None:
    at = f"{PARAM}.json_schema"
    if not isinstance(given, Mapping):
        raise MissingParameter(f"{at} is required: an object of name and schema", param=at)
    _only(given, ("name", "description", "schema", "strict"), at)
    name = given.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise InvalidParameter(
            f"{at}.name must be a string of 1 to {MAX_NAME} characters", param=f"{at}.name"
        )
    if not isinstance(given.get("description") or "", str):
        raise InvalidParameter(f"{at}.description must be a string", param=f"{at}.description")
    if not isinstance(given.get("strict") or False, bool):
        raise InvalidParameter(f"{at}.strict must be true or false", param=f"{at}.strict")
    schema = given.get("schema")
    if not isinstance(schema, Mapping):
        raise InvalidParameter(f"{at}.schema must be an object", param=f"{at}.schema")
    for where, keyword in _unknown_keywords(schema, f"{at}.schema", 0):
        message = (
            f"{where}: {keyword[:80]!r} cannot be enforced; known: {', '.join(sorted(_KEYWORDS))}"
        )
        raise InvalidParameter(message, param=f"{where}.{keyword[:80]}")
    _check_numbers(schema, f"{at}.schema")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise InvalidParameter(
            f"{at}.schema is longer than {MAX_SCHEMA_BYTES} bytes", param=f"{at}.schema"
        )


def _check_numbers(value: Any, at: str) -> None:
    """Raise InvalidParameter for an integer that the grammar library would round, or a count that
    it cannot hold.
    """
    children = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in children:
        where = f"{at}[{name}]" if isinstance(name, int) else f"{at}.{name[:80]}"
        if isinstance(item, int) and not isinstance(item, bool):
            most = checks.MOST if name in _COUNTS else checks.EXACT
            checks.integer(item, where, 0 if name in _COUNTS else -most, most)
        _check_numbers(item, where)


def _unknown_keywords(schema: Any, at: str, depth: int) -> Iterator[tuple[str, str]]:
    """Keywords that would be passed over, each with the place of its schema."""
    if depth > MAX_DEPTH:
        raise InvalidParameter(
            f"{at[:80]}... is nested deeper than {MAX_DEPTH}", param=f"{PARAM}.json_schema.schema"
        )
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword not in _KEYWORDS and keyword not in _ANNOTATIONS:
            yield at, str(keyword)
        elif keyword in _MAPS and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _unknown_keywords(inner, f"{at}.{keyword}.{str(name)[:80]}", depth + 1)
        elif keyword in _LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield from _unknown_keywords(inner, f"{at}.{keyword}[{i}]", depth + 1)
        elif keyword in _SINGLE:
            yield from _unknown_keywords(value, f"{at}.{keyword}", depth + 1)


def grammar_of(schema: Mapping[str, Any]) -> str:
    """The schema as llguidance's grammar. Raises ConfigurationError where llguidance is not
    installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as exc:
        raise ConfigurationError(
            "response_format needs llguidance: pip install 'vdiff[worker]'", param=PARAM
        ) from exc
    # -0.0 is 0, but the grammar library finds no way to write it.
    text = json.dumps(_without_negative_zero(schema))
    return LLMatcher.grammar_from_json_schema(text, overrides=STYLE)


def _without_negative_zero(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_negative_zero(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_negative_zero(inner) for inner in value]
    return 0 if isinstance(value, float) and value == 0 else value


def _culprit(schema: Mapping[str, Any], at: str) -> str:
    """Return the path of the bound that the grammar library refuses by itself, or `at`."""
    for path, keyword, value in islice(bounds_of(schema, at), MAX_BOUNDS):
        if _refusal(json.dumps({"type": "number", keyword: value})) is not None:
            return path
    return at


@lru_cache(maxsize=256)
def _refusal(schema: str) -> str | None:
    """Why a schema cannot be enforced, or None. Batches ask with the same schema line after line."""
    from llguidance import LLMatcher

    grammar = grammar_of(json.loads(schema))
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed or messages:
        text = " ".join(messages)
        if "look-around" in text:
            return "a pattern of it uses look-around, which is not supported"
        return "a pattern of it cannot be read" if "regex parse error" in text else text[:500]
    return (
        "each of its values would contain another one, without end"
        if is_endless(json.loads(schema))
        else None
    )


def with_order(diffusion: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The request's diffusion fields with an algorithm that can follow a grammar, where they name
    none.

    Raises:
        InvalidParameter: they name another, or the model has none.
    """
    served = [name for name in LEFT_TO_RIGHT if name in card.capabilities["algorithms"]]
    if card.regime == UNIFORM or not served:
        message = f"{PARAM} does not fit {card.name}: no algorithm of it commits tokens from left to right"
        raise InvalidParameter(message, param=PARAM)
    algorithm = diffusion.get("algorithm")
    if algorithm is None:
        usual = card.defaults.get("diffusion", {}).get("algorithm")
        algorithm = (
            "threshold" if "threshold" in diffusion else usual if usual in served else served[0]
        )
    if algorithm not in served and algorithm in card.capabilities["algorithms"]:
        message = (
            f"diffusion.algorithm {algorithm} does not commit one token after the other, which is what a grammar can follow; "
            f"with {PARAM} there are {' and '.join(served)}"
        )
        raise InvalidParameter(message, param="diffusion.algorithm")
    return {**diffusion, "algorithm": algorithm}


def check_beside(params: Any) -> None:
    """Refuse what would cut the JSON, or contradict the grammar. Raises InvalidParameter."""
    diffusion = params.diffusion
    for name, off in (("stop", ()), ("stop_token_ids", ()), ("ignore_eos", False)):
        if getattr(params, name) != off:
            raise InvalidParameter(f"{name} contradicts {PARAM}: {_ENDS}", param=name)
    for name in ("suppress_end", "max_forwards", "draft_token_ids"):
        if getattr(diffusion, name) is not None:
            reason = "a draft has tokens in the middle" if name == "draft_token_ids" else _ENDS
            raise InvalidParameter(
                f"diffusion.{name} contradicts {PARAM}: {reason}", param=f"diffusion.{name}"
            )
