"""JSON from clients: what PostgreSQL can hold, and nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from shared.errors import InvalidBody
from shared.json_bounds import check_bounds
from shared.text_files import NotUTF8, decode_text

_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
EXACT_CHARACTERS = 15  # a shorter number has few enough digits to come back from a double as it is
PART_CHARACTERS = 80  # of a key in the path of an error
_Node = tuple[Any, str | int]  # parent (a node or None), and the key or index in it


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"{name} is not a JSON value")


class Inexact(float):
    """A number with more digits than a double keeps; a schema must not have one."""

    written: str  # as the client wrote it


def _keeps(text: str, value: float) -> bool:
    try:
        return Decimal(text) == Decimal(repr(value))
    except ArithmeticError:  # an exponent that no computer holds
        return False


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:40]} is too large")
    if len(text) > EXACT_CHARACTERS and not _keeps(text, value):
        value = Inexact(value)
        value.written = text[:80]
    return value


class _Refused(ValueError):
    """JSON that we refuse, in our own words."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                param = name[:80] if name and name.isprintable() else "body"
                raise InvalidBody(f"{name[:80]!r} appears twice in one object", param=param)
            seen.add(name)
    return found


def parse_json(raw: bytes) -> Any:
    """Parse strict JSON of what PostgreSQL can hold: no NaN, no NUL characters, no lone surrogates,
    no name twice in one object, and no more values and levels than `shared.json_bounds` allows.

    Raises:
        InvalidBody: says what and where; `param` is `body` or the field's name.
    """
    check_bounds(raw)
    try:
        text = decode_text(raw, "the body")
    except NotUTF8 as exc:
        raise InvalidBody(exc.message, param="body", code=exc.code) from exc
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except json.JSONDecodeError as exc:
        message = f"the body is not valid JSON: line {exc.lineno}, column {exc.colno}"
        raise InvalidBody(message, param="body") from exc
    except _Refused as exc:
        raise InvalidBody(f"the body is not valid JSON: {exc}", param="body") from exc
    except ValueError as exc:  # Python's own limit of digits
        raise InvalidBody(
            "the body is not valid JSON: an integer has too many digits", param="body"
        ) from exc
    if "\\u" in text and not _is_storable(value):  # only escapes can smuggle these in
        _check_characters(value)
    return value


def _is_storable(value: Any) -> bool:
    """Return whether no string in the value has a NUL or half of a surrogate pair."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if _NOT_STORABLE.search(item):
                return False
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return True


def _check_characters(value: Any) -> None:
    """Raise InvalidBody for the first string that PostgreSQL cannot hold.

    Each item on the stack refers to its parent. A path per item would take the length of a key for
    every value below it.
    """
    stack: list[tuple[_Node | None, Any]] = [(None, value)]
    while stack:
        node, item = stack.pop()
        if isinstance(item, str):
            if _NOT_STORABLE.search(item):
                where = _path(node) or "body"
                message = f"{where} has a NUL character or half of a surrogate pair"
                raise InvalidBody(message, param=where, code="invalid_characters")
        elif isinstance(item, dict):
            for key, inner in item.items():
                stack.append((node, key))
                stack.append(((node, key), inner))
        elif isinstance(item, list):
            stack.extend(((node, i), inner) for i, inner in enumerate(item))


def _path(node: _Node | None) -> str:
    """Return the path of a value, like `messages[0].content`, with each key cut to PART_CHARACTERS."""
    parts: list[str] = []
    while node is not None:
        node, part = node
        parts.append(
            f"[{part}]" if isinstance(part, int) else f".{storable(part[:PART_CHARACTERS])}"
        )
    return "".join(reversed(parts)).removeprefix(".")


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
