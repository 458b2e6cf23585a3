"""The command line. A command reads the settings (`VDIFF_*`), lets its options win, and does one thing.

servers.py    run a part: up, api, worker, migrate, health, flower        offline.py    generate
keys.py       keys create, list, revoke, rotate                           config.py     config show, check
bench.py      bench decoders                            options.py    what they share
"""

from __future__ import annotations

import sys

import typer

from shared.errors import VDiffError
from vdiff.cli import bench, config, keys, offline, servers
from vdiff.cli.offline import EXIT_INTERRUPTED

EXIT_CONFIGURATION = 2

app = typer.Typer(
    name="vdiff",
    help="vdiff: the job system for diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # else "[default: auto]" is taken for markup and disappears
    pretty_exceptions_enable=False,
)
app.add_typer(servers.app)
app.add_typer(offline.app)
app.add_typer(keys.app, name="keys")
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")


@app.command()
def version() -> None:
    """Print the version."""
    from vdiff.version import __version__

    typer.echo(__version__)


def main() -> None:
    """The entry point: errors are one line, and say what to do."""
    try:
        app()
    except VDiffError as exc:
        typer.echo(f"vdiff: {exc.message}", err=True)
        sys.exit(EXIT_CONFIGURATION)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
