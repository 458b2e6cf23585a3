"""JSON from clients: what PostgreSQL can hold, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidBody
from shared.text_files import NotUTF8, decode_text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                param = name[:80] if name and name.isprintable() else "body"
                raise InvalidBody(f"{name[:80]!r} stands twice in one object", param=param)
            seen.add(name)
    return found


def parse_json(raw: bytes) -> Any:
    """Strict JSON of what PostgreSQL can hold: no NaN, no NUL characters, no lone surrogates, no name twice in
    one object, bounded nesting.

    Raises:
        InvalidBody: says what and where; `param` is `body` or the field's name.
    """
    try:
        text = decode_text(raw, "the body")
    except NotUTF8 as exc:
        raise InvalidBody(exc.message, param="body", code=exc.code) from exc
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise InvalidBody("the body is nested too deeply", param="body") from exc
    except ValueError as exc:
        raise InvalidBody(f"the body is not JSON: {exc}", param="body") from exc
    if "\\u" in text:  # only escapes can smuggle these in
        _check_characters(value)
    return value


def _check_characters(value: Any) -> None:
    stack = [("", value)]
    while stack:
        where, item = stack.pop()
        if isinstance(item, str):
            if "\x00" in item or any(0xD800 <= ord(c) <= 0xDFFF for c in item):
                message = f"{where or 'body'} has a NUL character or half of a surrogate pair"
                raise InvalidBody(message, param=where or "body", code="invalid_characters")
        elif isinstance(item, dict):
            for key, inner in item.items():
                stack.append((where or "body", key))
                stack.append((f"{where}.{key}" if where else key, inner))
        elif isinstance(item, list):
            stack.extend((f"{where}[{i}]", inner) for i, inner in enumerate(item))


def storable(value: Any) -> Any:
    """Return the value without NUL characters and lone surrogates, which PostgreSQL refuses.

    Keys are cleaned too. Keys that differed before stay apart: the later one gets U+FFFD appended.
    """
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        made: dict[Any, Any] = {}
        for key, item in value.items():
            name = storable(key)
            while name in made:
                name += "\ufffd"
            made[name] = storable(item)
        return made
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


class NotStorable(ValueError):
    """A value that no column can hold."""


def require_storable(value: Any, *, most_bytes: int) -> None:
    """Raise NotStorable if the value is not JSON or takes more than `most_bytes` as JSON text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        size = len(text.encode("utf-8"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise NotStorable(f"it is not JSON: {exc}") from exc
    if size > most_bytes:
        raise NotStorable(f"it takes {size} bytes, more than {most_bytes}")
