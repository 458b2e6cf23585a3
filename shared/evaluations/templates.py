"""`{{column}}` templates: text with the columns of one item. Strict: a column that an item lacks is
an error. Pure.

No conditions, loops or filters: a template comes from a client and runs in the API process.
`{{a.b}}` reads inside a column, `\\{{` writes two braces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidParameter

MAX_LENGTH = 100_000
_TOKEN = re.compile(r"\\\{\{|\{\{\s*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\s*\}\}|\{\{")


class MissingColumn(InvalidParameter):
    code = "missing_column"


def text_of(value: Any) -> str:
    """A column's value in a text: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Template:
    """A checked template; `parts` are texts and paths of columns in turn, beginning with a text."""

    source: str
    param: str  # the field that it came from
    parts: tuple[Any, ...]

    @property
    def columns(self) -> list[str]:
        return [".".join(path) for path in self.parts[1::2]]

    def value(self, row: Mapping[str, Any]) -> Any:
        """The column itself when the template is nothing else, so that numbers and lists stay what
        they are; else text.

        Raises:
            MissingColumn: without the line, which the caller knows.
        """
        if len(self.parts) == 3 and self.parts[0] == self.parts[2] == "":
            return self._lookup(row, self.parts[1])
        return "".join(
            p if i % 2 == 0 else text_of(self._lookup(row, p)) for i, p in enumerate(self.parts)
        )

    def text(self, row: Mapping[str, Any]) -> str:
        """Raises MissingColumn."""
        return text_of(self.value(row))

    def _lookup(self, row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        value: Any = row
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                known = ", ".join(list(row)[:10])
                message = f"there is no column {'.'.join(path)!r}, which {self.param} uses; there are: {known[:300]}"
                raise MissingColumn(message, param=self.param)
            value = value[name]
        return value


def parse_template(source: Any, param: str) -> Template:
    """Raises InvalidParameter."""
    if not isinstance(source, str):
        raise InvalidParameter(f"{param} must be a string", param=param)
    if len(source) > MAX_LENGTH:
        raise InvalidParameter(f"{param} has more than {MAX_LENGTH} characters", param=param)
    parts: list[Any] = [""]
    at = 0
    for found in _TOKEN.finditer(source):
        parts[-1] += source[at : found.start()]
        at = found.end()
        if found[1] is not None:
            parts += [tuple(found[1].split(".")), ""]
        elif found[0] == "\\{{":
            parts[-1] += "{{"
        else:
            around = source[found.start() : found.start() + 40]
            message = f"{param}: {around!r} is no {{{{column}}}}; write \\{{{{ for two braces"
            raise InvalidParameter(message, param=param)
    parts[-1] += source[at:]
    return Template(source, param, tuple(parts))
