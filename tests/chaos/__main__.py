"""A run with a bar, tables and an exit code: 0 nothing found, 1 a rule was broken, 130 stopped by
hand.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tests.chaos import report
from tests.chaos.bugs import BUGS
from tests.chaos.plan import KINDS
from tests.chaos.run import Options, run
from tests.chaos.run import Progress as Told

LINE_SECONDS = 10.0  # between two lines where there is no terminal


class Teller:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, jobs: int, faults: int) -> None:
        self._console, self._faults = console, faults
        self._line_at = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=jobs, rate="", eta="-")

    def __enter__(self) -> Teller:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, told: Told) -> None:
        rate = told.over / max(told.seconds, 0.001)
        eta = f"{(told.jobs - told.over) / rate:.0f} s" if rate > 0 else "-"
        text = f"{told.phase}, {told.faults}/{self._faults} faults"
        self._bar.update(
            self._task, completed=told.over, description=text, rate=f"{rate:.1f}/s", eta=eta
        )
        if not self._console.is_terminal and time.monotonic() - self._line_at > LINE_SECONDS:
            self._line_at = time.monotonic()
            self._console.print(
                f"{told.seconds:.0f} s: {text}, {told.over}/{told.jobs} jobs, {rate:.1f}/s, eta {eta}",
                highlight=False,
            )


def options_of(arguments: list[str]) -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--jobs", type=int, default=1_000, help="how many jobs the clients submit [%(default)s]"
    )
    parser.add_argument(
        "--faults", type=int, default=30, help="how many faults the plan has [%(default)s]"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="decides the jobs and the plan [drawn, and told]"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="worker processes, at least 2 [%(default)s]"
    )
    parser.add_argument("--concurrency", type=int, default=32, help="clients at once [%(default)s]")
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin no more jobs and faults after so long, and judge [no limit]",
    )
    parser.add_argument(
        "--only", action="append", choices=list(KINDS), help="only this kind of fault; repeatable"
    )
    parser.add_argument(
        "--plant", choices=list(BUGS), help="plant this bug: succeeds when the checker complains"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="leave the logs of all processes there"
    )
    given = parser.parse_args(arguments)
    if given.jobs < 1 or given.faults < 0 or given.workers < 2 or given.concurrency < 1:
        parser.error(
            "--jobs and --concurrency must be at least 1, --faults at least 0, --workers at least 2"
        )
    seed = given.seed if given.seed is not None else time.time_ns() % 1_000_000
    kinds = tuple(dict.fromkeys(given.only)) if given.only else tuple(KINDS)
    options = Options(
        jobs=given.jobs,
        faults=given.faults,
        seed=seed,
        workers=given.workers,
        concurrency=given.concurrency,
        kinds=kinds,
        bug=given.plant,
        logs=given.logs,
        minutes=given.minutes,
    )
    return options, given.json


def main(arguments: list[str]) -> int:
    options, file = options_of(arguments)
    console = Console()
    console.print(f"seed {options.seed}", highlight=False)
    # SIGTERM like Ctrl-C: everything that was begun is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Teller(console, options.jobs, options.faults) as tell:
            found = run(options, tell=tell)
    except KeyboardInterrupt:
        console.print("stopped; every process was ended, nothing was judged")
        return 130
    report.show(found, console)
    if file is not None:
        file.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    broken = {violation.rule for violation in found.violations}
    if options.bug is None:
        return 1 if broken else 0
    caught = broken & BUGS[options.bug].rules
    what = BUGS[options.bug].what
    console.print(
        f"planted: {what}; "
        + (f"caught by: {', '.join(sorted(caught))}" if caught else "[red]not caught[/red]")
    )
    return 0 if caught else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
