"""`vdiff bench`: measure decoders on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.checks import MOST
from shared.errors import ConfigurationError
from vdiff.cli.options import Device, Dtype, MaxNumSeqs, Model, Verifier, examples, settings_of

app = typer.Typer(no_args_is_help=True, help="Measure decoders.")


@app.callback()
def group() -> None:
    """Measure decoders."""


@app.command(
    epilog=examples(
        "vdiff bench decoders --limit 50",
        "vdiff bench decoders --algorithm threshold --algorithm apd --max-tokens 32 --json",
        "vdiff bench decoders --model ./LLaDA-8B-Instruct --verifier ./Qwen2.5-0.5B --input questions.jsonl",
    )
)
def decoders(
    model: Model = None,
    verifier: Verifier = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="evaluation set, JSONL with metadata.answer [default: the bundled model's]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="folder of decoders.json and decoders.svg")] = Path(
        "bench-results"
    ),
    temperature: Annotated[float, typer.Option(min=0, max=2, help="of every request")] = 0.0,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            help="only this one; may be given several times [default: all that the model has]"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="instead of each line's own")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="lines of the set [default: all]")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_num_seqs: MaxNumSeqs = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Compare every decoder of a model on one evaluation set: accuracy against tokens per forward."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from vdiff import bench, bundled
    from worker.engine import VDiffEngine
    from worker.main import engine_config

    settings = settings_of(
        model=model, verifier=verifier, device=device, dtype=dtype, max_num_seqs=max_num_seqs
    )
    lines = bench.read_set(input or bundled.folder(bundled.DEFAULT_MODEL) / "eval.jsonl", limit)
    columns = (
        TextColumn("decoders"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with VDiffEngine(engine_config(settings)) as engine:
        known = engine.card.capabilities["algorithms"]
        for name in algorithm or ():
            if name not in known:
                message = f"{engine.card.name} has no algorithm {name!r}; it has {', '.join(known)}"
                raise ConfigurationError(message, param="algorithm")
        total = len(list(bench.settings_of(algorithm or known, engine.card.regime)))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("decoders", total=total)
            measured = bench.decoders(
                engine,
                lines,
                lambda _: bar.advance(task),
                algorithms=algorithm,
                temperature=temperature,
                max_tokens=max_tokens,
            )
        facts = {
            "model": engine.card.name,
            "verifier": engine.card.verifier,
            "lines": len(lines),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
    data, plot = bench.write(measured, output, facts)
    if as_json:
        typer.echo(json.dumps(json.loads(data.read_text(encoding="utf-8"))))
        return
    table = Table()
    for column in (
        "decoder",
        "exact match",
        "95% interval",
        "tokens/forward",
        "forwards",
        "tokens/s",
        "accepted",
    ):
        table.add_column(column, no_wrap=True, justify="left" if column == "decoder" else "right")
    for m in measured:
        table.add_row(
            m.name,
            f"{m.accuracy:.1%}",
            f"{m.low:.1%} to {m.high:.1%}",
            f"{m.tokens_per_forward:.2f}",
            str(m.forwards),
            f"{m.tokens / m.seconds:.0f}",
            "" if m.acceptance_rate is None else f"{m.acceptance_rate:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    typer.echo(f"wrote {data} and {plot}", err=True)
