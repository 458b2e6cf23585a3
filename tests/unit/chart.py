"""The chart without Helm: the few words of its language that it uses. `test_helm.py` holds this to
Helm itself.
"""

from __future__ import annotations

import json
import re
from collections import deque
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "vdiff"
_ACTION = re.compile(r"(?:\s*\{\{-|\{\{)\s*(.*?)\s*(?:-\}\}\s*|\}\})")
_VALUE = re.compile(r"(?:(toJson|toYaml|add) )?(\.[\w.]*)(?: \| nindent (\d+)| (\d+))?")
_BLOCKS = ("if", "range", "with")

Node = (
    str | tuple[str, "list[Node] | None"]
)  # text, or an action with what stands between it and its `end`


def values(**changed: Any) -> dict[str, Any]:
    """values.yaml with some of it changed, as Helm merges: objects by name, all else as a whole."""
    return _merged(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), changed)


def render(given: dict[str, Any]) -> dict[str, str]:
    """Text by the template's name; a template of which nothing is left is left out."""
    made = {t.name: rendered(t.read_text(encoding="utf-8"), given) for t in templates()}
    return {name: text for name, text in made.items() if text.strip()}


def templates() -> list[Path]:
    return sorted((CHART / "templates").iterdir())


def used() -> set[str]:
    """Values that templates name."""
    texts = (t.read_text(encoding="utf-8") for t in templates())
    return {name for text in texts for name in re.findall(r"\.Values\.([\w.]+)", text)}


def rendered(template: str, given: dict[str, Any]) -> str:
    return _filled(_tree(deque(_ACTION.split(template))), {"Values": given})


def _merged(before: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    made = dict(before)
    for name, value in changed.items():
        old = made.get(name)
        made[name] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return made


def _tree(parts: deque[str]) -> list[Node]:
    """Args: parts: text, action, text, ... to the end or to the `end` of the block."""
    made: list[Node] = [parts.popleft()]
    while parts:
        action = parts.popleft()
        if action == "end":
            return made
        made.append((action, _tree(parts) if action.partition(" ")[0] in _BLOCKS else None))
        made.append(parts.popleft())
    return made


def _filled(tree: list[Node], scope: Any) -> str:
    return "".join(node if isinstance(node, str) else _acted(*node, scope) for node in tree)


def _acted(action: str, inner: list[Node] | None, scope: Any) -> str:
    if inner is None:
        return _text(action, scope)
    word, _, name = action.partition(" ")
    turned, value = name.startswith("not "), _look(name.removeprefix("not "), scope)
    if word == "if":
        return _filled(inner, scope) if bool(value) != turned else ""
    return "".join(
        _filled(inner, each) for each in (value if word == "range" else [value] if value else [])
    )


def _text(action: str, scope: Any) -> str:
    match = _VALUE.fullmatch(action)
    assert match, f"{{{{ {action} }}}} is none of the words that are understood here"
    how, name, indent, more = match.groups()
    value = _look(name, scope)
    if how == "toJson":
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    elif how == "toYaml":
        text = yaml.safe_dump(value, default_flow_style=False).rstrip("\n")
    elif how == "add":
        text = str(value + int(more))
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return (
        text
        if indent is None
        else "".join(f"\n{' ' * int(indent)}{line}" for line in text.splitlines())
    )


def _look(name: str, scope: Any) -> Any:
    for part in name.strip(".").split(".") if name != "." else ():
        scope = scope[part]
    return scope
