"""Write the reference pages that follow from the code: docs/settings.md and docs/cli.md.

    python scripts/make_docs.py            write them
    python scripts/make_docs.py --check    name those that are out of date, and exit with 1

`tests/unit/test_docs.py` does the second too.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# A checkout wins over an installed vdiff.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from shared.checks import plain
from shared.settings import PREFIX, Settings
from vdiff.cli import app
from vdiff.cli.exits import MEANINGS

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by scripts/make_docs.py from {source}; change that file, then run `make docs`. -->\n"
_BOUND_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _sections() -> dict[str, str]:
    """Field name -> the comment that heads its group in the source."""
    section, found = "", {}
    for line in inspect.getsource(Settings).splitlines():
        if heading := re.fullmatch(r" {4}# (.+)", line):
            section = heading.group(1)
        elif name := re.match(r" {4}(\w+): ", line):
            found[name.group(1)] = section
    return found


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return (
            "texts, comma-separated" if str in get_args(annotation) else "numbers, comma-separated"
        )
    parts = [a for a in get_args(annotation) if a is not type(None)] or [annotation]
    if len(parts) == 1 and get_origin(parts[0]) is Literal:
        return _type(parts[0])
    names = {
        "SecretStr": "text, secret",
        "int": "integer",
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "Path": "path",
    }
    return " or ".join(names.get(part.__name__, part.__name__) for part in parts)


def _bound(value: float) -> str:
    """Return a bound in full: `plain` rounds integers of 1e15 and above."""
    return str(value) if isinstance(value, int) else plain(value)


def _default(value: Any) -> str:
    """Return a default as it is written in the environment; nothing for no default and for an empty
    list.
    """
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _bounds(metadata: list[Any]) -> str:
    said = [
        f"{words} {_bound(getattr(item, sign))}"
        for item in metadata
        for sign, words in _BOUND_SIGNS.items()
        if hasattr(item, sign)
    ]
    return f", {' and '.join(said)}" if said else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def settings_page() -> str:
    """Every setting: variable, kind, default, meaning."""
    lines = [
        "# Settings",
        "",
        NOTE.format(source="shared/settings.py"),
        f"Each setting is an environment variable that begins with `{PREFIX}`. An option of the command line wins over the",
        "variable, the variable over the default. An empty variable counts as not set. A bad value, or a variable that is",
        "no setting, stops the process with exit code 2 and one line that names it.",
    ]
    section = None
    sections = _sections()
    for name, field in Settings.model_fields.items():
        if sections[name] != section:
            section = sections[name]
            lines += [
                "",
                f"## {section}",
                "",
                "| variable | value | default | meaning |",
                "|---|---|---|---|",
            ]
        default = field.get_default()
        shown = _default(default)
        kind = _type(field.annotation) + _bounds(field.metadata)
        lines.append(
            f"| `{PREFIX}{name.upper()}` | {kind} | {shown} | {_cell(field.description or '')} |"
        )
    return "\n".join(lines) + "\n"


def _commands(command: Any, context: Any, path: str) -> list[tuple[str, Any, Any]]:
    """(name, command, context) of every command, also of those in groups."""
    found = []
    for name, inner in command.commands.items():
        inner_context = inner.context_class(inner, info_name=name, parent=context)
        if hasattr(inner, "commands"):
            found += _commands(inner, inner_context, f"{path} {name}")
        else:
            found.append((f"{path} {name}", inner, inner_context))
    return found


def cli_page() -> str:
    """Every command with its options."""
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        NOTE.format(source="vdiff/cli"),
        "Every command reads the [settings](settings.md); its options win over them. `vdiff --install-completion` teaches your",
        "shell to complete commands and options.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in MEANINGS.items()),
    ]
    for name, command, context in _commands(
        root, root.context_class(root, info_name="vdiff"), "vdiff"
    ):
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        lines += [
            "",
            f"## {name}",
            "",
            inspect.cleandoc(command.help or "").replace("\b\n", ""),
            "",
            "```",
            usage,
            "```",
        ]
        records = [
            record for p in command.params if (record := p.get_help_record(context)) is not None
        ]
        if records:
            lines += ["", "| option | meaning |", "|---|---|"]
            lines += [
                f"| `{_cell(option)}` | {_cell(re.sub(r'  +', ' ', text))} |"
                for option, text in records
            ]
        if command.epilog:
            _, _, shown = command.epilog.partition("Examples:\n")
            lines += ["", "```sh", *(line.strip() for line in shown.splitlines()), "```"]
    return "\n".join(lines) + "\n"


PAGES = {"docs/settings.md": settings_page, "docs/cli.md": cli_page}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when a page is out of date"
    )
    check = parser.parse_args().check
    stale = 0
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            print(f"{name} is out of date; run `make docs`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
