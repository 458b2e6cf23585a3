"""Commands that run a part of vdiff: all of it, the API, a worker, Flower, the migrations."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import ConfigurationError
from shared.settings import is_loopback
from vdiff.cli.options import (
    ApiKey,
    BlockSize,
    Compile,
    CudaGraphs,
    Device,
    DiffusionSteps,
    Dtype,
    EnableApd,
    GpuMemoryUtilization,
    Host,
    MaxModelLen,
    MaxNumSeqs,
    Model,
    Port,
    Quantization,
    Revision,
    ServedName,
    TensorParallelSize,
    Tokenizer,
    TrustRemoteCode,
    Verifier,
    settings_of,
)

app = typer.Typer()


@app.command()
def up(
    host: Host = None,
    port: Port = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of data and logs [default: .vdiff]")
    ] = None,
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
    compile: Compile = None,
    cuda_graphs: CudaGraphs = None,
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
) -> None:
    """Run everything here: PostgreSQL and Redis (embedded, unless VDIFF_DATABASE_URL and
    VDIFF_REDIS_URL are set), migrations, workers, the API and Flower. Ctrl-C stops all of it.
    """
    given = {
        name: value for name, value in locals().items() if name not in ("workers", "no_flower")
    }
    from vdiff.up import Supervisor

    raise typer.Exit(Supervisor(settings_of(**given), workers=workers, flower=not no_flower).run())


@app.command()
def api(host: Host = None, port: Port = None, api_key: ApiKey = None) -> None:
    """Run the API alone."""
    settings = settings_of(host=host, port=port, api_key=api_key)
    try:
        from api.server import run
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"the API needs `pip install 'vdiff[api]'` ({exc.name} is missing)"
        ) from exc
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
    compile: Compile = None,
    cuda_graphs: CudaGraphs = None,
    diffusion_steps: DiffusionSteps = None,
    block_size: BlockSize = None,
    enable_apd: EnableApd = None,
    verifier: Verifier = None,
) -> None:
    """Run one worker alone: it loads the model, registers it, and serves its queues."""
    settings = settings_of(**locals())
    try:
        from worker.main import run
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"a worker needs `pip install 'vdiff[worker]'` ({exc.name} is missing)"
        ) from exc
    raise typer.Exit(run(settings))


@app.command()
def deliver() -> None:
    """Send webhooks. `vdiff up` starts one; without any, events wait in the database."""
    settings = settings_of()
    try:
        from worker.delivery import run
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"this needs `pip install 'vdiff[api]'` ({exc.name} is missing)"
        ) from exc
    raise typer.Exit(run(settings))


@app.command()
def migrate() -> None:
    """Bring the database of VDIFF_DATABASE_URL up to date."""
    from sqlalchemy.exc import OperationalError

    from migrations import run

    url = settings_of().require_database_url()
    try:
        before = run.current_revision(url)
        run.upgrade(url)
    except OperationalError as exc:
        reason = str(exc.orig).strip().splitlines()[0]
        raise ConfigurationError(f"cannot migrate: {reason}", param="database_url") from exc
    head = run.head_revision()
    typer.echo(f"the database is at {head}" + ("" if before != head else ", as it was"))


class Part(StrEnum):
    """A process with heartbeats instead of a port."""

    WORKER = "worker"
    DELIVER = "deliver"


@app.command()
def health(
    part: Annotated[
        Part, typer.Argument(help="worker, or deliver: what sends webhooks")
    ] = Part.WORKER,
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="by its last turn alone, for a liveness probe: PostgreSQL is not asked"
        ),
    ] = False,
) -> None:
    """Say whether a part on this machine can do its work, for containers' health checks: 0 yes, 1
    no.

    Looks at its heartbeats, and tries a write to PostgreSQL and to Redis. An error names the
    remedy.
    """
    import socket

    if local:
        from shared import liveness

        seconds = liveness.seconds_since_turn(part.value)
        stale_seconds = liveness.stale_seconds(settings_of().heartbeat_seconds)
        turned = "never turned here" if seconds is None else f"turned {seconds:.0f} s ago"
        typer.echo(f"{part.value}: {turned}")
        raise typer.Exit(0 if seconds is not None and seconds <= stale_seconds else 1)

    from contextlib import closing

    from sqlalchemy.exc import SQLAlchemyError

    from shared import health as state
    from shared import serving
    from shared.db.session import Database
    from shared.queue import client as queue_client
    from shared.webhooks import senders
    from vdiff.local import with_local_services

    settings = with_local_services(settings_of())
    find = serving.live_workers if part is Part.WORKER else senders.live
    database = Database(settings.require_database_url())
    try:
        with database.read() as session:
            live = session.execute(find(stale_seconds=settings.worker_stale_seconds)).all()
        problems = [("PostgreSQL", state.probe_database(database))]
    except SQLAlchemyError as exc:
        typer.echo(f"vdiff: cannot ask PostgreSQL: {state.describe_database(exc)}", err=True)
        raise typer.Exit(1) from exc
    finally:
        database.dispose()
    if settings.redis_url is not None:
        with closing(
            queue_client.connect(settings.redis_url, timeout_seconds=state.TIMEOUT_SECONDS)
        ) as client:
            problems.append(("Redis", state.probe_redis(client)))
    mine = [row.id for row in live if row.hostname == socket.gethostname()]
    what = "worker" if part is Part.WORKER else "sender of webhooks"
    typer.echo(f"alive: {', '.join(mine)}" if mine else f"no live {what} on {socket.gethostname()}")
    for name, problem in problems:
        if problem is not None:
            typer.echo(f"vdiff: {name}: {problem}", err=True)
    raise typer.Exit(0 if mine and all(problem is None for _, problem in problems) else 1)


@app.command()
def flower(
    host: Host = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="port of Flower [default: 5555]")
    ] = None,
) -> None:
    """Run Flower, the page that shows Celery's workers and tasks."""
    settings = settings_of(host=host, flower_port=port)
    password = settings.flower_basic_auth
    if password is None and not is_loopback(settings.host):
        raise ConfigurationError(
            f"Flower on {settings.host} needs a password: set VDIFF_FLOWER_BASIC_AUTH=name:password",
            param="flower_basic_auth",
        )
    try:
        import flower.command  # noqa: F401  # makes `flower` known to Celery
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"this needs `pip install 'vdiff[flower]'` ({exc.name} is missing)"
        ) from exc
    from worker.app import celery_app

    celery = celery_app(settings.require_redis_url(), model=None)
    if password is not None:
        os.environ["FLOWER_BASIC_AUTH"] = (
            password.get_secret_value()
        )  # an argument could be read in `ps`
    celery.start(
        [
            "flower",
            f"--address={settings.host}",
            f"--port={settings.flower_port}",
            "--logging=warning",
        ]
    )
