"""Reference pages of the site that follow from the program: routes from its OpenAPI document,
metrics from its registries.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from api.app import create_app
from api.routes.metrics import database_metrics
from shared.metrics import WORKER
from shared.settings import load_settings

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}


@cache
def openapi() -> dict[str, Any]:
    """The document that a server has at /openapi.json."""
    # It connects when it starts, and never does.
    return create_app(
        load_settings({}, database_url="postgresql://nowhere/x", redis_url="redis://nowhere/0")
    ).openapi()


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return (
            " or ".join(dict.fromkeys(_kind(o) for o in options if o.get("type") != "null"))
            or "any"
        )
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    said = [words.format(schema[name]) for name, words in _BOUNDS.items() if name in schema]
    return ", ".join([kind, *said])


def _table(head: str, rows: list[tuple[str, dict[str, Any], bool]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {head} | value | |", "|---|---|---|"]
    for name, schema, required in rows:
        default = schema.get("default")
        said = ["required" if required else "", schema.get("description", "")]
        said.append("" if default is None else f"default `{json.dumps(default)}`")
        words = ", ".join(part for part in said if part)
        lines.append(f"| `{name}` | {_cell(_kind(schema))} | {_cell(words)} |")
    return [*lines, ""]


def _body(content: dict[str, Any]) -> list[str]:
    lines = []
    for media, given in content.items():
        schema = given.get("schema", {})
        lines += [f"Body: `{media}`.", ""]
        required = set(schema.get("required", ()))
        rows = [
            (name, inner, name in required) for name, inner in schema.get("properties", {}).items()
        ]
        lines += _table("field", rows)
    return lines


def http_page() -> str:
    """Every route: what it does, parameters, body, answers."""
    document = openapi()
    lines = [
        "# HTTP, route by route",
        "",
        "Made from the program's [OpenAPI document](openapi.json), which a running server has at `/openapi.json`, and in",
        "a form to try it with at `/docs`. What fields mean, and the errors, is in [HTTP API](../api.md).",
    ]
    for path, methods in document["paths"].items():
        for method, given in methods.items():
            lines += ["", f"## {method.upper()} {path}", ""]
            if given.get("description"):
                lines += [given["description"], ""]
            parameters = given.get("parameters", ())
            for place in ("path", "query", "header"):
                rows = [
                    (
                        p["name"],
                        {**p["schema"], "description": p.get("description", "")},
                        p.get("required", False),
                    )
                    for p in parameters
                    if p["in"] == place
                ]
                lines += _table(f"{place} parameter", rows)
            lines += _body(given.get("requestBody", {}).get("content", {}))
            answers = [
                code for code in given["responses"] if code != "422"
            ]  # ours is 400, with the field's name
            lines.append(
                f"Answers {' or '.join(answers)}; errors as [problem+json](../api.md#errors)."
            )
    return "\n".join(lines) + "\n"


def families() -> Iterator[Metric]:
    """Every metric that the API shows: its own, the workers', and those read from the database."""
    yield from (family for family in REGISTRY.collect() if family.name.startswith("vdiff"))
    yield from WORKER.collect()
    empty: list[Any] = [
        {} if "dict" in str(p.annotation) else ()
        for p in inspect.signature(database_metrics).parameters.values()
    ]
    yield from database_metrics(*empty)


def metrics_page() -> str:
    """Every metric with its kind and help."""
    shown = {family.name + "_total" * (family.type == "counter"): family for family in families()}
    lines = [
        "# Metrics",
        "",
        "What `GET /metrics` shows, made from the program; a worker's numbers arrive with its heartbeats. How to read",
        "and add them up over processes is in [Operations](../operations.md#watch).",
        "",
        "| metric | kind | meaning |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {family.type} | {_cell(family.documentation)} |"
        for name, family in sorted(shown.items())
    ]
    return "\n".join(lines) + "\n"
