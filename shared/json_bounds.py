"""Bounds of JSON text, checked on the bytes before any object is made of them.

A text of 2 MB can become hundreds of megabytes of Python objects: `[[],[],...]` takes 64 bytes for
each three that it has. `json.loads` also holds the interpreter for as long as it takes. So depth,
containers and values are counted first. The count gives the interpreter back between two tokens,
and ends at the first bound that is passed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.errors import InvalidBody

MAX_DEPTH = 100
MAX_CONTAINERS = 50_000  # objects and lists
MAX_VALUES = 500_000  # of all lists and objects together

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# A bracket, or all that stands between two of them. A quote alone begins a string that does not
# end: no JSON.
_TOKEN = re.compile(rb'[\[\]{}]|(?:[^"\[\]{}]++|' + _STRING + rb')++|"', re.DOTALL)
_PIECE = re.compile(rb'[^"]++|' + _STRING, re.DOTALL)


def check_bounds(raw: bytes) -> int:
    """Return how many pieces of the text were looked at. Text that is no JSON may pass:
    `json.loads` refuses it.

    Raises:
        InvalidBody: more containers, values or levels than a body may have.
    """
    upper = raw.count(b"[") + raw.count(b"{")  # those in strings too
    crowded = upper + raw.count(b",") >= MAX_VALUES
    if upper <= MAX_DEPTH and not crowded:
        return 0
    depth = containers = values = looked = 0
    for token in _tokens(raw):
        looked += 1
        if token in (b"[", b"{"):
            depth, containers, values = depth + 1, containers + 1, values + 1
            if depth > MAX_DEPTH:
                raise _too("nested too deeply", f"{MAX_DEPTH} levels")
            if containers > MAX_CONTAINERS:
                raise _too("too complex", f"{MAX_CONTAINERS} lists and objects")
        elif token in (b"]", b"}"):
            depth -= 1
        elif crowded:
            for piece in _PIECE.finditer(token):
                looked += 1
                found = piece.group()
                values += 0 if found.startswith(b'"') else found.count(b",")
                if values > MAX_VALUES:
                    break
        if values > MAX_VALUES:
            raise _too("too complex", f"{MAX_VALUES} values")
    return looked


def _tokens(raw: bytes) -> Iterator[bytes]:
    for found in _TOKEN.finditer(raw):
        token = found.group()
        if token == b'"':
            return
        yield token


def _too(what: str, bound: str) -> InvalidBody:
    return InvalidBody(f"the body is {what}: at most {bound} are allowed", param="body")
