"""The command line. Each command reads the settings (`VDIFF_*`), lets its options win, and runs one part."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.errors import ConfigurationError, VDiffError
from shared.settings import Settings, load_settings
from vdiff import keys

EXIT_CONFIGURATION = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="vdiff",
    help="vdiff: the job system for diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # else "[default: auto]" is taken for markup and disappears
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")

Host = Annotated[str | None, typer.Option(help="address that the API listens on [default: 127.0.0.1]")]
Port = Annotated[int | None, typer.Option(help="port of the API; 0 picks a free one [default: 8000]")]

# Of the engine; the names are vLLM's where it has them. `None` is "not given": then VDIFF_<NAME> or the default counts.
Model = Annotated[str | None, typer.Option(help="model folder or hub id [default: the bundled vdiff-tiny]")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="a static key that may do everything; VDIFF_API_KEY keeps it out of `ps` [default: none]"),
]
Tokenizer = Annotated[str | None, typer.Option(help="tokenizer folder or hub id [default: the model's own]")]
Revision = Annotated[str | None, typer.Option(help="hub revision of the model")]
ServedName = Annotated[str | None, typer.Option(help="name that clients use [default: the folder's name]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps [default: auto]")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 [default: auto]")]
MaxModelLen = Annotated[int | None, typer.Option(help="context length, tokens [default: the model's own]")]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", "--max-batch", help="sequences per step, the engine's slots [default: 8]"),
]
TrustRemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="run the code of a model's repository [default: never]")
]
TensorParallelSize = Annotated[int | None, typer.Option(help="devices per model; only 1 is built [default: 1]")]
GpuMemoryUtilization = Annotated[
    float | None, typer.Option(help="share of the accelerator's memory that may be taken [default: no limit]")
]
Quantization = Annotated[str | None, typer.Option(help="how weights are stored [default: as --dtype says]")]
DiffusionSteps = Annotated[int | None, typer.Option(help="default steps of an answer [default: one per token]")]
BlockSize = Annotated[int | None, typer.Option(help="default block_length, tokens [default: the model's own, else 32]")]
EnableApd = Annotated[
    bool | None, typer.Option("--enable-apd/--disable-apd", help="Adaptive Parallel Decoding [default: off]")
]
Verifier = Annotated[str | None, typer.Option(help="autoregressive model that APD asks, folder or hub id")]


def _settings(**overrides: Any) -> Settings:
    return load_settings(None, **overrides)


@app.command()
def up(
    host: Host = None,
    port: Port = None,
    data_dir: Annotated[Path | None, typer.Option(help="folder of data and logs [default: .vdiff]")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="worker processes")] = 1,
    api_key: ApiKey = None,
    no_flower: Annotated[bool, typer.Option("--no-flower", help="do not start Flower")] = False,
    model: Model = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    served_model_name: ServedName = None,
    device: Device = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    trust_remote_code: TrustRemoteCode = None,
    tensor_parallel_size: TensorParallelSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    quantization: Quantization = None,
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
) -> None:
    """Run everything here: PostgreSQL and Redis (embedded, unless VDIFF_DATABASE_URL and VDIFF_REDIS_URL are set),
    migrations, workers, the API and Flower. Ctrl-C stops all of it."""
    given = {name: value for name, value in locals().items() if name not in ("workers", "no_flower")}
    from vdiff.up import Supervisor

    raise typer.Exit(Supervisor(_settings(**given), workers=workers, flower=not no_flower).run())


@app.command()
def api(host: Host = None, port: Port = None, api_key: ApiKey = None) -> None:
    """Run the API alone."""
    settings = _settings(host=host, port=port, api_key=api_key)
    try:
        from api.server import run
    except ModuleNotFoundError as exc:
        raise ConfigurationError(f"the API needs `pip install 'vdiff[api]'` ({exc.name} is missing)") from exc
    raise typer.Exit(run(settings))


@app.command()
def worker(
    model: Model = None,
    tokenizer: Tokenizer = None,
    revision: Revision = None,
    served_model_name: ServedName = None,
    device: Device = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    trust_remote_code: TrustRemoteCode = None,
    tensor_parallel_size: TensorParallelSize = None,
    gpu_memory_utilization: GpuMemoryUtilization = None,
    quantization: Quantization = None,
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
) -> None:
    """Run one worker alone: it loads the model, registers it, and serves its queues."""
    settings = _settings(**locals())
    try:
        from worker.main import run
    except ModuleNotFoundError as exc:
        raise ConfigurationError(f"a worker needs `pip install 'vdiff[worker]'` ({exc.name} is missing)") from exc
    raise typer.Exit(run(settings))


@app.command()
def migrate() -> None:
    """Bring the database of VDIFF_DATABASE_URL up to date."""
    from sqlalchemy.exc import OperationalError

    from migrations import run

    url = _settings().require_database_url()
    try:
        before = run.current_revision(url)
        run.upgrade(url)
    except OperationalError as exc:
        reason = str(exc.orig).strip().splitlines()[0]
        raise ConfigurationError(f"cannot migrate: {reason}", param="database_url") from exc
    head = run.head_revision()
    typer.echo(f"the database is at {head}" + ("" if before != head else ", as it was"))


@app.command()
def health() -> None:
    """Say whether a worker of this machine is alive, for containers' health checks: 0 yes, 1 no."""
    import socket

    from sqlalchemy.exc import SQLAlchemyError

    from shared import serving
    from shared.db.session import Database

    settings = _settings()
    database = Database(settings.require_database_url())
    try:
        with database.read() as session:
            live = session.execute(serving.live_workers(stale_seconds=settings.worker_stale_seconds)).all()
    except SQLAlchemyError as exc:
        typer.echo(f"vdiff: cannot ask PostgreSQL ({type(exc).__name__})", err=True)
        raise typer.Exit(1) from exc
    finally:
        database.dispose()
    mine = [worker.id for worker in live if worker.hostname == socket.gethostname()]
    typer.echo(f"alive: {', '.join(mine)}" if mine else f"no live worker on {socket.gethostname()}")
    raise typer.Exit(0 if mine else 1)


@app.command()
def flower(
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="port of Flower [default: 5555]")] = None,
) -> None:
    """Run Flower, the page that shows Celery's workers and tasks."""
    settings = _settings(host=host, flower_port=port)
    try:
        import flower.command  # noqa: F401  # makes `flower` known to Celery
    except ModuleNotFoundError as exc:
        raise ConfigurationError(f"this needs `pip install 'vdiff[flower]'` ({exc.name} is missing)") from exc
    from worker.app import celery_app

    celery = celery_app(settings.require_redis_url(), model=None)
    celery.start(["flower", f"--address={settings.host}", f"--port={settings.flower_port}", "--logging=warning"])


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="model folder or hub id")],
    input: Annotated[Path, typer.Option(help="JSONL of requests, one a line")],
    output: Annotated[Path, typer.Option(help="JSONL of answers, written line by line in the input's order")],
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
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
) -> None:
    """Decode a file of prompts without any server. A bad line gets an error line; the rest goes on."""
    given = {name: value for name, value in locals().items() if name not in ("input", "output")}
    settings = _settings(**given)
    from worker.main import engine_config
    from worker.offline import generate_file

    summary = generate_file(engine_config(settings), input, output)
    typer.echo(summary.text(), err=True)
    if summary.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


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
