"""The API process: wiring only. Routes are in `api.routes` and `api.openai`, what they do in
`shared.jobs.service`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import redis.asyncio
import structlog
from fastapi import Depends, FastAPI
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.middleware.cors import CORSMiddleware

from api import dashboard, errors, openapi
from api.auth import Authenticator
from api.backpressure import WaitingRoom
from api.changes import Changes
from api.dependencies import Context, known_query
from api.followers import Followers
from api.limits import RequestLimiter
from api.maintenance import MaintenanceProcess
from api.middleware import (
    QUIET,
    BodyLimitMiddleware,
    CrossSiteMiddleware,
    LoggingMiddleware,
    RateHeadersMiddleware,
    RequestIDMiddleware,
)
from api.openai import batches, files, responses
from api.openai import routes as openai_routes
from api.paths import HeadMiddleware, PrefixMiddleware, route_path
from api.routes import (
    evaluations,
    health,
    jobs,
    keys,
    metrics,
    models,
    overview,
    queue,
    steps,
    tokenizer,
    usage,
    webhooks,
)
from shared.batches.caretaker import BatchCaretaker
from shared.batches.service import BatchService
from shared.db.lists import ListsDatabase
from shared.db.session import AsyncDatabase
from shared.evaluations.caretaker import EvaluationCaretaker
from shared.evaluations.reading import EvaluationReader
from shared.evaluations.sandbox_pool import SandboxPool
from shared.evaluations.service import EvaluationService
from shared.events import EventReader
from shared.files.objects import open_store
from shared.files.service import FileService
from shared.health import HealthProbe
from shared.jobs import queries
from shared.jobs.estimate import Forecasts
from shared.jobs.service import JobService
from shared.links import use_prefix
from shared.queue.window import REDIS_SECONDS
from shared.served_models import ServedModels
from shared.settings import Settings, get_settings
from shared.vault import vault_of
from shared.watch import JobWatch
from vdiff import bundled

_log = structlog.get_logger(__name__)

EXPOSED = (
    "X-Request-ID",
    "X-Job-Id",
    "Location",
    "Retry-After",
    "ETag",
    "Preference-Applied",
    "RateLimit",
    "RateLimit-Policy",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-should-retry",
    "Content-Disposition",
)
"""Headers of answers that a page of an origin in `VDIFF_CORS_ORIGINS` may read."""
FORM_BYTES = 64 * 1024  # what a form may add to its file
REDIS_TIMEOUT_S = 5.0
REDIS_CONNECTIONS_MAX = 6  # of one process; one of them is the subscription's
REDIS_CONNECT_TIMEOUT_S = 1.0  # an API without Redis answers slower, not never


def redis_client(url: str) -> redis.asyncio.Redis:
    """Make a client that fails fast: what Redis does is a hint, and PostgreSQL has the rest.

    A command waits for one of a few connections, so that their number does not grow with the
    requests.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=REDIS_CONNECTIONS_MAX,
        timeout=REDIS_CONNECT_TIMEOUT_S,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
    )
    return redis.asyncio.Redis.from_pool(pool)


def make_context(settings: Settings) -> Context:
    database = AsyncDatabase(settings.require_database_url())
    lists = ListsDatabase(settings.require_database_url())
    client = redis_client(settings.require_redis_url())
    models = ServedModels(database)
    waiter = JobWatch(client, lambda job_ids: read_over(database, job_ids))
    stopping = asyncio.Event()
    service = JobService(database, client, models, waiter, settings)
    objects = None if settings.file_store is None else open_store(settings.file_store)
    file_service = FileService(
        database,
        objects,
        max_bytes=settings.max_file_bytes,
        expires_seconds=settings.default_file_seconds,
        quota_bytes=settings.max_stored_file_bytes or None,
        lists=lists,
    )
    wake, evaluations_wake = asyncio.Event(), asyncio.Event()
    sandboxes = SandboxPool(settings.sandboxes, memory_mb=settings.sandbox_memory_mb)
    return Context(
        settings=settings,
        database=database,
        lists=lists,
        redis=client,
        models=models,
        waiter=waiter,
        events=EventReader(client),
        jobs=service,
        files=file_service,
        batches=BatchService(database, wake, service, lists),
        caretaker=BatchCaretaker(database, client, service, file_service, settings, wake),
        evaluations=EvaluationService(
            database,
            service,
            file_service,
            bundled.DATASETS,
            settings,
            evaluations_wake,
            sandboxes,
            lists,
        ),
        evaluation_reader=EvaluationReader(lists, settings),
        evaluation_caretaker=EvaluationCaretaker(
            database, client, service, settings, evaluations_wake, sandboxes
        ),
        forecasts=Forecasts(database),
        auth=Authenticator(database, settings),
        limiter=RequestLimiter(client, settings.require_redis_url()),
        waiting_room=WaitingRoom(settings.max_waiting_requests),
        followers=Followers(
            most=settings.max_followers, most_per_key=settings.max_followers_per_key
        ),
        changes=Changes(stopping),
        stopping=stopping,
        health=HealthProbe(database, client, redis_seconds=REDIS_SECONDS),
        vault=vault_of(settings.secret_keys),
    )


def _log_gone(reason: str) -> None:
    """Say that a part ended, where no server of ours can end the process (`api.server` can)."""
    _log.critical("background_part_gone", reason=reason)


async def read_over(database: AsyncDatabase, job_ids: Sequence[str]) -> Sequence[str]:
    """Return those of these jobs that are over or gone."""
    async with database.read() as session:
        return list((await session.execute(queries.over_of(job_ids))).scalars())


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; connects when it starts.

    Raises:
        ConfigurationError: VDIFF_DATABASE_URL or VDIFF_REDIS_URL is missing.
    """
    settings = settings or get_settings()
    settings.require_database_url()
    settings.require_redis_url()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context = app.state.context = make_context(settings)
        on_gone = getattr(app.state, "on_gone", _log_gone)
        context.waiter.start(on_gone)
        context.caretaker.start(on_gone)
        context.evaluation_caretaker.start(on_gone)
        maintenance = MaintenanceProcess(settings, on_gone)
        maintenance.start()
        try:
            yield
        finally:
            context.stop()
            await asyncio.to_thread(maintenance.close)
            await asyncio.gather(context.caretaker.stop(), context.evaluation_caretaker.stop())
            await asyncio.gather(*context.background, return_exceptions=True)
            await asyncio.gather(
                context.changes.stop(), context.waiter.stop(), context.events.stop()
            )
            await context.redis.aclose()
            await context.database.dispose()
            await context.lists.dispose()

    use_prefix(settings.root_path)
    app = FastAPI(
        title="vdiff",
        root_path=settings.root_path,
        # the URL would be built from the request's Host, without the proxy's scheme
        redirect_slashes=False,
        summary="The job system for diffusion language models",
        version=health.version(),
        lifespan=lifespan,
        # FastAPI's page loads its script from another host; ours is in `api.dashboard`
        docs_url=None,
        redoc_url=None,
        # FastAPI makes a span of each request once `shared.tracing` has a collector; nothing else
        # is measured by it.
        telemetry={
            "auto_configure": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "exclude": lambda scope: route_path(scope).startswith(QUIET),
        },
    )
    errors.install(app)
    for module in (
        jobs,
        steps,
        openai_routes,
        responses,
        files,
        batches,
        evaluations,
        models,
        overview,
        queue,
        tokenizer,
        usage,
        webhooks,
    ):
        app.include_router(module.router, dependencies=[Depends(known_query)])
    for router in (
        keys.own,
        keys.router,
        responses.creating,
        webhooks.secrets_router,
    ):  # `self` before the ids
        app.include_router(router, dependencies=[Depends(known_query)])
    for module in (health, metrics):  # probes and scrapers add what they like
        app.include_router(module.router)
    openapi.document(app)
    dashboard.install(app)
    # The last added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=settings.max_body_bytes,
        larger={"/v1/files": settings.max_file_bytes + FORM_BYTES},
    )
    app.add_middleware(CrossSiteMiddleware, allowed=settings.cors_origins)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RateHeadersMiddleware)
    app.add_middleware(LoggingMiddleware)
    app.add_middleware(RequestIDMiddleware)
    if settings.cors_origins:  # preflights are answered here: a browser sends no key with them
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
            max_age=600,
        )
    if settings.root_path:
        app.add_middleware(PrefixMiddleware, prefix=settings.root_path)
    return app
