"""Dependencies of request handlers: the process's parts, and the body as checked JSON."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import redis.asyncio
from fastapi import Depends, Request
from fastapi.routing import APIRoute

from shared import checks
from shared.batches.caretaker import BatchCaretaker
from shared.batches.service import BatchService
from shared.db.lists import ListsDatabase
from shared.db.session import AsyncDatabase
from shared.errors import InvalidBody, InvalidParameter, UnknownParameter, UnsupportedMediaType
from shared.evaluations.caretaker import EvaluationCaretaker
from shared.evaluations.reading import EvaluationReader
from shared.evaluations.service import EvaluationService
from shared.events import EventReader
from shared.files.service import FileService
from shared.health import HealthProbe
from shared.jobs.estimate import Forecasts
from shared.jobs.service import JobService
from shared.served_models import ServedModels
from shared.settings import Settings
from shared.strict_json import parse_json
from shared.vault import Vault
from shared.watch import JobWatch

if TYPE_CHECKING:
    from api.auth import Authenticator
    from api.backpressure import WaitingRoom
    from api.changes import Changes
    from api.followers import Followers
    from api.limits import RequestLimiter

MAX_KEY_LENGTH = 255
PARSED_BESIDE_BYTES = 64 * 1024
CHECKS_ITS_QUERY = ("list_jobs",)  # routes whose query has names of the client's own: metadata[k]


@dataclass(slots=True)
class Context:
    """The parts of one API process; made by the lifespan in `api.app`."""

    settings: Settings
    database: AsyncDatabase
    lists: ListsDatabase
    redis: redis.asyncio.Redis
    models: ServedModels
    waiter: JobWatch
    events: EventReader
    jobs: JobService
    forecasts: Forecasts
    files: FileService
    batches: BatchService
    caretaker: BatchCaretaker
    evaluations: EvaluationService
    evaluation_reader: EvaluationReader
    evaluation_caretaker: EvaluationCaretaker
    auth: Authenticator
    limiter: RequestLimiter
    waiting_room: WaitingRoom
    followers: Followers
    changes: Changes
    health: HealthProbe
    vault: Vault
    stopping: asyncio.Event  # the process was told to end
    background: set[asyncio.Task[Any]] = field(default_factory=set)

    def stop(self) -> None:
        """Tell all who wait or follow that the process is about to end."""
        self.stopping.set()
        self.waiter.wake_everybody()
        self.changes.wake_everybody()

    def spawn(self, coroutine: Any) -> None:
        """Run beside the request, which may be over or cancelled by then."""
        task = asyncio.ensure_future(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(context_of)]


async def json_body(request: Request) -> Any:
    """Return the body of a request, as `parse_json` gives it.

    Bodies above `PARSED_BESIDE_BYTES` are parsed in a thread, one at a time in a process: the event
    loop goes on meanwhile, and the memory of one such body is taken at once, not that of many.

    Raises:
        UnsupportedMediaType: the body does not say that it is JSON.
        InvalidBody: the body is empty, or no JSON.
    """
    content_type = request.headers.get("content-type")
    if content_type is not None:
        kind = content_type.partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            message = f"Content-Type must be application/json, not {kind[:80]!r}"
            raise UnsupportedMediaType(message, param="content-type")
    raw = await request.body()
    if not raw:
        raise InvalidBody("the body is empty", param="body")
    if content_type is None:
        # A page may send a body without a type to any site, and the browser asks nobody first.
        raise UnsupportedMediaType(
            "Content-Type is required: application/json", param="content-type"
        )
    if len(raw) <= PARSED_BESIDE_BYTES:
        return parse_json(raw)
    state = request.app.state
    if not hasattr(state, "parsing"):
        state.parsing = asyncio.Lock()
    async with state.parsing:
        return await asyncio.to_thread(parse_json, raw)


async def optional_body(request: Request, known: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a body that may be left out, without nulls. Raises as `json_body`,
    InvalidParameter, UnknownParameter.
    """
    given = await json_body(request) if await request.body() else {}
    if not isinstance(given, dict):
        raise InvalidParameter("the body must be an object", param="body")
    return checks.known(given, known, "")


JsonBody = Annotated[Any, Depends(json_body)]


def known_query(request: Request) -> None:
    """Refuse what would not be read: `?wiat=30`, the first of two. Raises UnknownParameter,
    InvalidParameter.
    """
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if times > 1:
            shown = name.replace("\x00", "")[:80] or "query"
            raise InvalidParameter(f"{shown} is given {times} times", param=shown)
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or route.name in CHECKS_ITS_QUERY:
        return
    known = [field.alias for field in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no query"
            shown = name.replace("\x00", "")[:80] or "query"
            raise UnknownParameter(
                f"{shown} is not a parameter here: {request.method} {route.path} {takes}",
                param=shown,
            )


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header. Raises InvalidParameter."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
        message = f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} printable ASCII characters"
        raise InvalidParameter(message, param="Idempotency-Key")
    return key


def is_automatic_retry(request: Request) -> bool:
    """Return whether the OpenAI SDK sent this same request before."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return count.isascii() and count.isdigit() and int(count[:6]) >= 1
