"""`vdiff doctor`: is everything well, and what to do if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vdiff.cli.exits import FAILED
from vdiff.cli.options import AsJson, examples, settings_of
from vdiff.cli.output import console

app = typer.Typer()
_STYLE = {"ok": "green", "note": "yellow", "bad": "bold red"}


@app.command(
    epilog=examples(
        "vdiff doctor",
        "vdiff doctor --json | jq '.checks[] | select(.state == \"bad\")'",
        "VDIFF_DATABASE_URL=... VDIFF_REDIS_URL=... VDIFF_BASE_URL=https://... vdiff doctor",
    )
)
def doctor(
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="notes count as bad too")] = False,
) -> None:
    """Look at database, migrations, Redis, workers, clocks, disk, queues, webhooks and API. Each
    line is ok, a note (will become bad, or looks odd) or bad, with what to do. Exit code 1 when
    something is bad.
    """
    from vdiff.doctor import Check, examine
    from vdiff.local import with_local_services

    out = console()
    found: list[Check] = []
    for check in examine(with_local_services(settings_of())):
        found.append(check)
        if not as_json:
            line = Table.grid(padding=(0, 1))
            for width in (5, 10):
                line.add_column(width=width, no_wrap=True)
            line.add_column(overflow="fold")
            line.add_row(Text(check.state, style=_STYLE[check.state]), check.name, Text(check.text))
            if check.advice:
                line.add_row("", "", Text(f"-> {check.advice}"))
            out.print(line)
    wrong = [c for c in found if c.state == "bad" or (strict and c.state == "note")]
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "checks": [asdict(c) for c in found]}, indent=2))
    raise typer.Exit(FAILED if wrong else 0)
