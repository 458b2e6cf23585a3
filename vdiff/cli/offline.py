"""`vdiff generate`: decode a file without any server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vdiff.cli import exits
from vdiff.cli.options import (
    LINES,
    BlockSize,
    Compile,
    CudaGraphs,
    Device,
    DiffusionSteps,
    Dtype,
    EnableApd,
    GpuMemoryUtilization,
    MaxModelLen,
    MaxNumSeqs,
    Quantization,
    Revision,
    TensorParallelSize,
    Tokenizer,
    TrustRemoteCode,
    Verifier,
    examples,
    settings_of,
)

app = typer.Typer()


@app.command(
    epilog=examples(
        "vdiff generate --model ./LLaDA-8B-Instruct --input prompts.jsonl --output answers.jsonl",
        "vdiff generate --model GSAI-ML/LLaDA-8B-Instruct --input in.jsonl --output out.jsonl --max-batch 16 --dtype bfloat16",
    )
)
def generate(
    model: Annotated[str, typer.Option(help="model folder or hub id")],
    input: Annotated[Path, typer.Option(help=f"JSONL: {LINES}")],
    output: Annotated[
        Path, typer.Option(help="JSONL of answers, written line by line in the input's order")
    ],
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    trust_remote_code: TrustRemoteCode = None,
    tensor_parallel_size: TensorParallelSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    quantization: Quantization = None,
    compile: Compile = None,
    cuda_graphs: CudaGraphs = None,
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print what was done as one object, for programs")
    ] = False,
) -> None:
    """Decode a file of prompts without any server. A bad line gets an error line and the rest goes
    on; exit code 1 then.
    """
    given = {
        name: value
        for name, value in locals().items()
        if name not in ("input", "output", "as_json")
    }
    settings = settings_of(**given)
    from worker.main import engine_config
    from worker.offline import generate_file

    summary = generate_file(engine_config(settings), input, output)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
    else:
        typer.echo(summary.text(), err=True)
    if summary.interrupted:
        raise typer.Exit(exits.INTERRUPTED)
    if summary.errors:
        typer.echo(
            f"{summary.errors} of {summary.lines} failed; {output} says why, line by line", err=True
        )
        raise typer.Exit(exits.FAILED)
