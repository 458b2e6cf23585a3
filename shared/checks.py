"""One value of a request's body at a time: the right type and within its bounds, or an error with
the field's full name.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from shared.errors import InvalidParameter, UnknownParameter

MOST = 2**31 - 1
"""The upper bound of a count that has no closer one: a four-byte integer, here and in PostgreSQL."""
EXACT = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""
MAX_SHOWN_DIGITS = 40  # of a refused number, in a message


def integer(value: Any, param: str, low: int, high: int) -> int:
    """Return the integer. Raises InvalidParameter when it is none, or beyond its bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{param} must be an integer", param=param)
    if not low <= value <= high:
        raise InvalidParameter(f"{param} must be from {low} to {high}{_not(value)}", param=param)
    return value


def _not(value: int) -> str:
    """Return `, not 5`, or nothing for a number that is too long to repeat."""
    return f", not {value}" if abs(value) < 10**MAX_SHOWN_DIGITS else ""


def plain(value: float) -> str:
    """A bound as people write it: 2592000, not 2.592e+06."""
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:g}"


def number(value: Any, param: str, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(f"{param} must be a number", param=param)
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not math.isfinite(real) or real > high or real < low or (open_low and real == low):
        bounds = f"{'above' if open_low else 'from'} {plain(low)} {'and at most' if open_low else 'to'} {plain(high)}"
        raise InvalidParameter(f"{param} must be {bounds}", param=param)
    return real


def flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameter(f"{param} must be true or false", param=param)
    return value


def choice(value: Any, param: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InvalidParameter(
            f"{param} must be one of {', '.join(choices)}, not {str(value)[:80]!r}", param=param
        )
    return value


def token_ids(value: Any, param: str, vocab_size: int, *, longest: int = 256) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > longest:
        raise InvalidParameter(
            f"{param} must be a list of at most {longest} token ids", param=param
        )
    return tuple(integer(v, f"{param}[{i}]", 0, vocab_size - 1) for i, v in enumerate(value))


def known(fields: Mapping[str, Any], allowed: tuple[str, ...], prefix: str) -> dict[str, Any]:
    for name in fields:
        if name not in allowed:
            param = f"{prefix}{str(name)[:80]}"
            hint = meant(str(name), allowed, prefix) or f"; known here: {', '.join(allowed)}"
            raise UnknownParameter(f"{param} is not supported{hint}", param=param)
    return {k: v for k, v in fields.items() if v is not None}


def meant(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean x?` of a name that is nearly another; nothing if it is none."""
    near = difflib.get_close_matches(name[:80], sorted(known), n=1, cutoff=0.75)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
