"""The worker process: load the engine, register, start the threads, let Celery consume until a
signal.

main thread        Celery's consumer (pool: threads, one per slot of the engine) pool threads
`worker.runner`: claim -> engine -> record, one job each vdiff-engine       the step loop
vdiff-heartbeat    leases, progress, statistics        vdiff-relay    events to Redis vdiff-cancels
cancels, the fast way               vdiff-sweeper  what others lost (`shared.maintenance`)
vdiff-dispatcher   Redis's window, filled from PostgreSQL in turns vdiff-housekeeping retention,
roll-ups (`shared.maintenance`) vdiff-isolation    suspects, apart from other jobs    vdiff-drain
waits for SIGTERM
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import redis
import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from migrations import run as migrations
from shared import liveness, metrics, serving, tracing
from shared.background import EXIT_THREAD_GONE, BackgroundThreads, Pulse
from shared.db.retries import persist
from shared.db.session import Database, WriteSession
from shared.errors import VDiffError
from shared.events import EventPublisher
from shared.ids import new_id
from shared.links import use_prefix
from shared.logging import identify, setup_logging
from shared.maintenance import POOL_SIZE, Maintenance
from shared.queue import client as queue_client
from shared.settings import Settings
from vdiff import bundled
from worker.app import celery_app
from worker.cancels import CancelListener
from worker.consumer import make_controller
from worker.dispatcher import Dispatcher
from worker.engine import VDiffConfig, VDiffEngine
from worker.express import Express
from worker.failure import load_or_tell, model_name
from worker.heartbeat import HangDetector, Heartbeat, memory_bytes
from worker.held import HeldAttempts
from worker.isolation import Isolation
from worker.lifecycle import EXIT_HUNG, Lifecycle, exit_now
from worker.pace import Pace
from worker.relay import Relay
from worker.runner import Counters, Runner
from worker.tasks import register_tasks

EXIT_CONFIGURATION = 2

_log = structlog.get_logger(__name__)


def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code. A thing that is set wrongly is one line on stderr and 2."""
    setup_logging(settings.log_level, settings.log_format)
    use_prefix(settings.root_path)
    liveness.begin("worker")
    try:
        database_url, redis_url = settings.require_database_url(), settings.require_redis_url()
        tracing.start("worker")
        migrations.require_current(database_url)
        engine = load_or_tell(
            lambda: VDiffEngine(engine_config(settings)), settings, database_url, version=_version()
        )
    except VDiffError as exc:
        print(f"vdiff worker: {exc.message}", file=sys.stderr)
        return EXIT_CONFIGURATION
    try:
        return serve(settings, engine, database_url, redis_url)
    finally:
        engine.shutdown()
        tracing.stop()


def engine_config(settings: Settings) -> VDiffConfig:
    """Build the engine's configuration from the settings. The bundled model comes with the bundled
    verifier. Raises ConfigurationError.
    """
    verifier = settings.verifier
    if settings.model is None and verifier is None:
        verifier = str(bundled.folder(bundled.DEFAULT_VERIFIER))
    return VDiffConfig(
        model=settings.model or str(bundled.folder(bundled.DEFAULT_MODEL)),
        tokenizer=settings.tokenizer,
        revision=settings.revision,
        served_model_name=settings.served_model_name,
        dtype=settings.dtype,
        device=settings.device,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        num_threads=settings.num_threads,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel_size=settings.tensor_parallel_size,
        quantization=settings.quantization,
        compile=settings.compile,
        cuda_graphs=settings.cuda_graphs,
        diffusion_steps=settings.diffusion_steps,
        block_size=settings.block_size,
        enable_apd=settings.enable_apd,
        verifier=verifier,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_batched_tokens=settings.max_batched_tokens,
        cache_tokens=settings.cache_tokens,
        watchdog_seconds=settings.hang_seconds,
    )


def serve(settings: Settings, engine: VDiffEngine, database_url: str, redis_url: str) -> int:
    """Everything after the model is loaded."""
    worker_id = new_id("worker")
    identify(worker_id=worker_id)
    slots = settings.max_num_seqs
    pace = Pace()
    # Celery's threads, those of urgent jobs, and maintenance.
    database = Database(database_url, pool_size=4, max_overflow=2 * slots + POOL_SIZE)
    client = queue_client.connect(redis_url)
    publisher = EventPublisher(
        client,
        stream_length=settings.event_stream_length,
        stream_seconds=settings.event_stream_seconds,
        stream_bytes=settings.event_stream_bytes,
        tenant_bytes=settings.event_tenant_bytes,
    )
    held = HeldAttempts()
    counters = Counters()
    relay = Relay(publisher)

    consumer = Pulse("celery-consumer")

    def on_draining() -> None:
        consumer.stopping.set()
        _set_state(database, worker_id, "draining")

    lifecycle = Lifecycle(
        database,
        client,
        held,
        drain_seconds=settings.drain_seconds,
        on_draining=on_draining,
    )
    threads = BackgroundThreads(lifecycle.fail)
    runner = Runner(
        database,
        client,
        engine,
        held,
        relay.put,
        worker_id=worker_id,
        lease_seconds=settings.lease_seconds,
        counters=counters,
        accepts=lambda: not lifecycle.draining,
        given_up=lambda: lifecycle.given_up,
        revision=engine.card.revision,
        model=engine.card.name,
        token_text=lambda token: engine.tokenizer.decode([token], skip_special_tokens=False),
        keep_steps_tokens=settings.keep_steps_tokens,
    )
    heartbeat = Heartbeat(
        database,
        held,
        worker_id=worker_id,
        lease_seconds=settings.lease_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
        hang=HangDetector(engine, settings.hang_seconds),
        on_hang=lambda: exit_now(EXIT_HUNG),
        stats=lambda: _stats(engine, counters, held, pace),
        state=lambda: "draining" if lifecycle.draining else "ready",
        silent=threads.silent,
    )
    maintenance = Maintenance.from_settings(
        settings, database, client, publisher, metrics.WORKER_DUTY_FAILURES, removes_deleted=False
    )
    dispatcher = Dispatcher(
        database,
        client,
        model=engine.card.name,
        slots=slots,
        stale_seconds=settings.worker_stale_seconds,
    )
    runner.on_claim = dispatcher.claimed
    cancels = CancelListener(client, database, held, dispatcher.told)
    isolation = Isolation(
        database,
        client,
        runner,
        runner.gate,
        model=engine.card.name,
        worker_id=worker_id,
        slots=slots,
        revision=engine.card.revision,
        accepts=lambda: not lifecycle.draining,
    )
    express = Express(
        client,
        held,
        runner.run_job,
        runner.put_back,
        model=engine.card.name,
        slots=slots,
        accepts=lambda: not lifecycle.draining and runner.gate.is_open,
    )

    def register(session: WriteSession, again: bool) -> None:
        session.execute(serving.register_model(engine.card, engine.tokenizer.files()))
        session.execute(
            serving.forget_failures(hostname=socket.gethostname(), model=model_name(settings))
        )
        session.execute(
            serving.register_worker(
                worker_id,
                model=engine.card.name,
                revision=engine.card.revision,
                hostname=socket.gethostname(),
                pid=os.getpid(),
                device=engine.card.device,
                slots=slots,
                version=_version(),
            )
        )

    lifecycle.install_signals()
    try:
        # The model is loaded: an outage of PostgreSQL must not throw it away. Only a shutdown ends
        # the wait.
        persist(database, register, give_up=lambda: lifecycle.draining)
    except (SQLAlchemyError, OSError):
        if not lifecycle.draining:
            raise
        _log.warning("worker_never_registered")
        lifecycle.wait_drained(settings.drain_seconds + 10)
        _close(database, client)
        return lifecycle.exit_code
    threads.add(
        relay.thread,
        heartbeat.thread,
        *maintenance.threads,
        cancels.thread,
        dispatcher.thread,
        express.thread,
        isolation.thread,
    )
    threads.watch(consumer)
    threads.start()
    _log.info("worker_ready", model=engine.card.name, slots=slots, device=engine.card.device)
    try:
        _consume(
            redis_url,
            engine.card.name,
            runner,
            consumer,
            lifecycle,
            slots=slots,
            worker_id=worker_id,
        )
        if not lifecycle.draining:
            # Celery gave up by itself, before `lifecycle.fail` heard of it: let the supervisor
            # start again.
            _log.critical("consumer_ended")
            return EXIT_THREAD_GONE
        lifecycle.wait_drained(settings.drain_seconds + 10)
    finally:
        dispatcher.close()
        threads.close()
        relay.close()
        _set_state(database, worker_id, "stopped", stats=_stats(engine, counters, held, pace))
        _close(database, client)
    _log.info("worker_stopped", exit_code=lifecycle.exit_code)
    return lifecycle.exit_code


def _close(database: Database, client: redis.Redis) -> None:
    database.dispose()
    with contextlib.suppress(RedisError, OSError):  # a connection to a Redis that is gone
        client.close()


def _consume(
    redis_url: str,
    model: str,
    runner: Runner,
    pulse: Pulse,
    lifecycle: Lifecycle,
    *,
    slots: int,
    worker_id: str,
) -> None:
    """Run Celery's consumer in this thread; return after `Lifecycle` raised Celery's own stop flag."""
    app = celery_app(redis_url, model=model, dropped=metrics.WORKER_MESSAGES_DROPPED)
    register_tasks(app, runner.run_job, runner.put_back)
    controller = make_controller(
        app,
        name=f"{worker_id}@{socket.gethostname()}",
        redis_url=redis_url,
        slots=slots,
        pulse=pulse,
        failures=metrics.WORKER_DUTY_FAILURES,
        restarts=metrics.WORKER_CONSUMER_RESTARTS,
        on_gone=lifecycle.fail,
    )
    controller.start()


def _stats(
    engine: VDiffEngine, counters: Counters, held: HeldAttempts, pace: Pace
) -> dict[str, Any]:
    work = engine.get_stats()
    return {
        "engine": work,
        "metrics": metrics.snapshot(),
        "recent": pace.since_last(work),
        **counters.snapshot(),
        "jobs_running": len(held),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
    }


def _set_state(
    database: Database,
    worker_id: str,
    state: serving.WorkerState,
    *,
    stats: dict[str, Any] | None = None,
) -> None:
    try:
        with database.write() as session:
            if stats is None:
                session.execute(serving.set_worker_state(worker_id, state))
            else:
                session.execute(serving.beat(worker_id, state=state, stats=stats))
    except SQLAlchemyError as exc:
        _log.warning("state_not_recorded", state=state, error=type(exc).__name__)


def _version() -> str:
    try:
        return version("vdiff")
    except PackageNotFoundError:
        return "0+unknown"
