"""Detection of JSON schemas that have no finite value because they require themselves inside
themselves. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any
from urllib.parse import unquote

# references that one answer of "this ends" may rest on; beyond, a schema gets the benefit of the
# doubt
ROUNDS = 64


def is_endless(schema: Mapping[str, Any]) -> bool:
    """Return whether every value of the schema would be infinitely long: the least fixed point over
    its references.
    """
    open_refs = {ref: target_of(schema, ref) for ref in _refs(schema)}
    finite: set[str] = set()
    for _ in range(ROUNDS):
        found = {ref for ref, target in open_refs.items() if _ends(target, finite)}
        if not found:
            return not _ends(schema, finite)
        finite |= found
        open_refs = {ref: target for ref, target in open_refs.items() if ref not in found}
    return False


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from _refs(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _refs(inner)


def target_of(schema: Any, ref: str) -> Any:
    """Return what a reference names; a schema without demands when it is not to be found here."""
    node = schema
    for part in unquote(ref.removeprefix("#")).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = node[int(name)] if name.isdecimal() and int(name) < len(node) else True
        else:
            node = node.get(name, True) if isinstance(node, Mapping) else True
    return node if ref.startswith("#") and (ref == "#" or ref.startswith("#/")) else True


def _ends(node: Any, finite: Set[str]) -> bool:
    """Return whether a value of the node can be finite when those of the references in `finite`
    can.
    """
    if not isinstance(node, Mapping):
        return node is not False
    if "const" in node or "enum" in node:
        return True
    if "$ref" in node and node["$ref"] not in finite:
        return False
    if not all(_ends(inner, finite) for inner in _list(node, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        if name in node and not any(_ends(inner, finite) for inner in _list(node, name)):
            return False
    kinds = node.get("type", "any")
    return any(
        _kind_ends(kind, node, finite) for kind in (kinds if isinstance(kinds, list) else [kinds])
    )


def _kind_ends(kind: Any, node: Mapping[str, Any], finite: Set[str]) -> bool:
    if kind == "object":
        return _object_ends(node, finite)
    return _array_ends(node, finite) if kind == "array" else True


def _object_ends(node: Mapping[str, Any], finite: Set[str]) -> bool:
    given = node.get("properties")
    ends = {
        name: _ends(inner, finite)
        for name, inner in (given.items() if isinstance(given, Mapping) else ())
    }
    others = "patternProperties" in node or _ends(node.get("additionalProperties", True), finite)
    required = (ends.get(name, others) for name in _list(node, "required"))
    return all(required) and (others or sum(ends.values()) >= _count(node, "minProperties"))


def _array_ends(node: Mapping[str, Any], finite: Set[str]) -> bool:
    least, first = _count(node, "minItems"), _list(node, "prefixItems")
    rest = node.get("additionalItems" if isinstance(node.get("items"), list) else "items", True)
    return all(_ends(inner, finite) for inner in first[:least]) and (
        least <= len(first) or _ends(rest, finite)
    )


def _list(node: Mapping[str, Any], name: str) -> list[Any]:
    value = node.get(name)
    return value if isinstance(value, list) else []


def _count(node: Mapping[str, Any], name: str) -> int:
    value = node.get(name)
    return int(value) if isinstance(value, int | float) else 0
