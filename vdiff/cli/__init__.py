"""The command line. A command reads the settings (`VDIFF_*`), lets its options win, and does one
thing.

servers.py    run a part: up, api, worker, migrate, health, flower        offline.py    generate
keys.py       keys create, list, revoke, rotate                           config.py     config show,
check bench.py      bench decoders                            doctor.py     doctor evaluations.py
eval run, wait, show, list, compare, report, cancel jobs.py       jobs list, get, watch, cancel,
retry      submit.py     submit batch.py      batch submit, list, get, results ...      models.py
models chat.py       chat                                      canvas.py     a job's text as it
comes connect.py, options.py, output.py, exits.py    what they share
"""

from __future__ import annotations

import sys

import typer

from shared.errors import VDiffError
from vdiff.cli import (
    batch,
    bench,
    chat,
    config,
    doctor,
    evaluations,
    exits,
    jobs,
    keys,
    models,
    offline,
    secrets,
    servers,
    submit,
)

app = typer.Typer(
    name="vdiff",
    help="vdiff: the job system for diffusion language models.",
    no_args_is_help=True,
    rich_markup_mode=None,  # else "[default: auto]" is taken for markup and disappears
    pretty_exceptions_enable=False,
)
app.add_typer(servers.app)
app.add_typer(doctor.app)
app.add_typer(submit.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(batch.app, name="batch")
app.add_typer(chat.app)
app.add_typer(models.app)
app.add_typer(offline.app)
app.add_typer(keys.app, name="keys")
app.add_typer(secrets.app, name="secrets")
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")
app.add_typer(evaluations.app, name="eval")


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
        for line in exc.message.splitlines():
            typer.echo(f"vdiff: {line}", err=True)
        sys.exit(exits.exit_code(exc))
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except Exception as exc:
        from vdiff.client.errors import ClientError

        if not isinstance(exc, ClientError):
            raise
        typer.echo(f"vdiff: {exc}{exits.advice(exc)}", err=True)
        sys.exit(exits.exit_code(exc))
