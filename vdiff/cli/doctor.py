"""`vdiff doctor`: is everything well, and what to do if not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from vdiff.cli.exits import FAILED
from vdiff.cli.options import AsJson, examples, settings_of
from vdiff.cli.output import console

app = typer.Typer()
_STYLE = {"ok": "green", "note": "yellow", "bad": "bold red"}


@app.command(
    epilog=examples(
        "vdiff doctor", "vdiff doctor --json | jq '.checks[] | select(.state == \"bad\")'",
        "VDIFF_DATABASE_URL=... VDIFF_REDIS_URL=... VDIFF_BASE_URL=https://... vdiff doctor",
    )
)  # fmt: skip
def doctor(
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="notes count as bad too")] = False,
) -> None:
    """Look at database, migrations, Redis, workers, clocks, disk, queues, webhooks and API. Each line is ok, a note (will
    become bad, or looks odd) or bad, with what to do. Exit code 1 when something is bad."""
    from vdiff.doctor import Check, examine
    from vdiff.local import with_local_services

    out = console()
    found: list[Check] = []
    for check in examine(with_local_services(settings_of())):
        found.append(check)
        if not as_json:
            style = _STYLE[check.state]
            out.print(f"[{style}]{check.state:<5}[/]", f"{check.name:<11}", end="")
            out.print(check.text, markup=False, highlight=False)
            if check.advice:
                out.print(f"{'':<18}-> {check.advice}", markup=False, highlight=False)
    wrong = [c for c in found if c.state == "bad" or (strict and c.state == "note")]
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "checks": [asdict(c) for c in found]}, indent=2))
    raise typer.Exit(FAILED if wrong else 0)
