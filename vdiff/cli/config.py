"""Commands about the settings: what is in force and where it comes from, and whether it holds
together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr

from shared.errors import ConfigurationError
from shared.settings import PREFIX, Settings, is_loopback
from vdiff.cli.exits import USAGE
from vdiff.cli.options import AsJson, examples, settings_of

app = typer.Typer(help="Settings: what is in force, and whether it holds together.")


def shown(name: str, value: Any) -> Any:
    """A value without what is secret in it."""
    if isinstance(value, SecretStr):
        return "***"
    if name.endswith("_url") and value:
        from sqlalchemy.engine import make_url

        return make_url(value).render_as_string(hide_password=True)
    return str(value) if isinstance(value, Path) else value


@app.command(
    epilog=examples("vdiff config show", "vdiff config show --json | jq '.lease_seconds.value'")
)
def show(
    as_json: Annotated[bool, typer.Option("--json", help="one object, for programs")] = False,
) -> None:
    """Every setting with its value, and whether the environment gave it. Secrets and passwords are
    masked.
    """
    settings = settings_of()
    rows = {
        name: {
            "value": shown(name, getattr(settings, name)),
            "from": "environment" if name in settings.model_fields_set else "default",
        }
        for name in Settings.model_fields
    }
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = max(map(len, rows)) + len(PREFIX)
    for name, row in rows.items():
        value = "" if row["value"] is None else row["value"]
        mark = "*" if row["from"] == "environment" else " "
        typer.echo(f"{mark} {PREFIX}{name.upper():<{width - len(PREFIX)}}  {value}".rstrip())
    typer.echo("* from the environment; all else is the default")


def contradictions(settings: Settings) -> list[str]:
    """Return the settings that are valid alone and do not work together."""
    found = []
    if settings.model is not None and settings.model.startswith((".", "/", "~")):
        folder = Path(settings.model).expanduser()
        if not (folder / "config.json").is_file():
            found.append(f"VDIFF_MODEL: {settings.model} has no config.json")
    if (settings.database_url is None) != (settings.redis_url is None):
        missing = "VDIFF_DATABASE_URL" if settings.database_url is None else "VDIFF_REDIS_URL"
        found.append(
            f"{missing} is not set, but its sibling is: only `vdiff up` starts the missing one by itself"
        )
    if settings.auth == "open" and not is_loopback(settings.host):
        found.append(
            f"VDIFF_AUTH=open on {settings.host}: whoever reaches the port may do everything"
        )
    if settings.worker_stale_seconds < 2 * settings.heartbeat_seconds:
        found.append(
            "VDIFF_WORKER_STALE_SECONDS is below two heartbeats: a worker that is well may count as away"
        )
    if settings.hang_seconds < settings.lease_seconds:
        found.append(
            "VDIFF_HANG_SECONDS is below VDIFF_LEASE_SECONDS: a slow step may end the worker"
        )
    return found


@app.command(
    epilog=examples("vdiff config check", "VDIFF_LEASE_SECONDS=10 vdiff config check --json")
)
def check(as_json: AsJson = False) -> None:
    """Check the environment's settings: exit with 0, or print a line for each fault and exit with
    2.
    """
    settings = settings_of()
    troubles = contradictions(settings)
    given = len(settings.model_fields_set)
    if as_json:
        typer.echo(json.dumps({"good": not troubles, "troubles": troubles, "given": given}))
        raise typer.Exit(USAGE if troubles else 0)
    for trouble in troubles:
        typer.echo(trouble, err=True)
    if troubles:
        raise ConfigurationError(f"{len(troubles)} setting(s) to look at")
    typer.echo(
        f"good: {given} of {len(Settings.model_fields)} settings given, the rest at their defaults"
    )
