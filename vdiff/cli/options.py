"""Options that several commands share. `None` is "not given": then VDIFF_<NAME> or the default
counts.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shared.checks import MOST
from shared.settings import Settings, load_settings

Host = Annotated[
    str | None, typer.Option(help="address that the API listens on [default: 127.0.0.1]")
]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="port of the API; 0 picks a free one [default: 8000]"),
]

# Of the engine; the names are vLLM's where it has them.
Model = Annotated[
    str | None, typer.Option(help="model folder or hub id [default: the bundled vdiff-tiny]")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="a static key that may do everything; VDIFF_API_KEY keeps it out of `ps` [default: none]"
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="tokenizer folder or hub id [default: the model's own]")
]
Revision = Annotated[str | None, typer.Option(help="hub revision of the model")]
ServedName = Annotated[
    str | None, typer.Option(help="name that clients use [default: the folder's name]")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps [default: auto]")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16 [default: auto]")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="context length, tokens [default: the model's own]"),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        "--max-num-seqs",
        "--max-batch",
        min=1,
        max=4096,
        help="sequences per step, the engine's slots [default: 8]",
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        help="run a model that is not built in, with its own code [default: never]",
    ),
]
TensorParallelSize = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="devices per model; only 1 is supported [default: 1]"),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="share of the accelerator's memory for weights and K/V [default: 0.9]"
    ),
]
Quantization = Annotated[
    str | None, typer.Option(help="int8: weights as 8-bit integers [default: as --dtype says]")
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="fuse the model's layers with torch.compile [default: no]"
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="replay recorded CUDA graphs [default: where they work]",
    ),
]
DiffusionSteps = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="default steps of an answer [default: one per token]"),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST, help="default block_length, tokens [default: the model's own, else 32]"
    ),
]
EnableApd = Annotated[
    bool | None,
    typer.Option(
        "--enable-apd/--disable-apd",
        help="Adaptive Parallel Decoding [default: where there is a verifier]",
    ),
]
Verifier = Annotated[
    str | None, typer.Option(help="autoregressive model that APD asks, folder or hub id")
]

# Of the files of prompts that `submit` and `generate` take.
LINES = "a text, a list of messages, or {custom_id, prompt|prompt_token_ids|messages, fields of generation} a line"

# Of every command that prints what a program may read.
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text")]


def examples(*lines: str) -> str:
    """A help text's last part; the mark keeps click from filling the lines into a paragraph."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def settings_of(**overrides: Any) -> Settings:
    """The settings; a model that ships with vdiff may be named without its folder. Raises
    ConfigurationError.
    """
    from pathlib import Path

    from vdiff import bundled

    settings = load_settings(None, **overrides)
    here = {
        name: str(bundled.folder(value))
        for name in ("model", "verifier")
        if (value := getattr(settings, name)) in (bundled.DEFAULT_MODEL, bundled.DEFAULT_VERIFIER)
        and not Path(value).exists()
    }
    return settings.model_copy(update=here) if here else settings
