"""`/v1/evaluations`: a dataset, a template, graders and configurations become jobs; their answers
are graded and compared.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse

from api.auth import PrincipalDep, requires
from api.dependencies import Context, ContextDep, JsonBody
from api.followers import FollowingStream
from api.openai.batches import window_seconds
from api.paging import no_nul, page_limit, page_object, whole_number
from shared import checks
from shared.errors import InvalidParameter, MissingParameter
from shared.evaluations import report as reports
from shared.evaluations.repository import Place
from shared.evaluations.requests import parse_configurations, parse_evaluation
from shared.evaluations.service import Made
from shared.evaluations.status import OPEN
from shared.evaluations.views import OUTCOMES, item_object, listed_item, short_object
from shared.keys.principal import Principal, Scope

router = APIRouter(
    prefix="/v1/evaluations", tags=["evaluations"], dependencies=[requires(Scope.BATCHES)]
)

MAX_PAGE, DEFAULT_PAGE = 100, 20
MAX_ITEMS, DEFAULT_ITEMS = 1_000, 100
RESAMPLES_MIN, RESAMPLES_MAX = 100, 100_000


def _body(*required: str, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "properties": properties,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_CONFIGURATIONS = {
    "type": "array",
    "items": {"type": "object", "required": ["name", "model"]},
    "minItems": 1,
}
_SIDE = {
    "type": "object",
    "required": ["evaluation", "configuration"],
    "properties": {"evaluation": {"type": "string"}, "configuration": {"type": "string"}},
}


async def _told(context: Context, made: Made) -> JSONResponse:
    shown = await context.evaluation_reader.show(made.row)
    body = {**shown, "reused": not made.created, "added": made.configurations}
    headers = {"Location": shown["urls"]["self"]}
    return JSONResponse(body, 201 if made.created else 200, headers)


@router.post(
    "",
    status_code=201,
    openapi_extra=_body(
        "dataset",
        "template",
        "graders",
        "configurations",
        name={"type": "string"},
        dataset={"type": "object"},
        template={"type": ["string", "array"]},
        endpoint={"type": "string"},
        graders={"type": "array", "items": {"type": "object"}},
        configurations=_CONFIGURATIONS,
        completion_window={"type": "string"},
        metadata={"type": "object"},
    ),
)
async def create_evaluation(
    body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> Response:
    """Check all of it and begin; 200 instead of 201 when the same evaluation is there, which then
    gets what is new.
    """
    settings = context.settings
    new = parse_evaluation(
        body, code_allowed=settings.code_graders, memory_mb_max=settings.sandbox_memory_mb
    )
    window = window_seconds(new.completion_window)
    return await _told(context, await context.evaluations.create(new, principal, window))


@router.get("")
async def list_evaluations(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: str | None = None,
) -> dict[str, Any]:
    """The tenant's evaluations, newest first, without results."""
    no_nul(request)
    size = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)
    rows, runs = await context.evaluations.page(principal.tenant, after=after, limit=size)
    return page_object([short_object(row, runs) for row in rows], size)


@router.post(
    "/compare",
    openapi_extra=_body(
        "first",
        "second",
        first=_SIDE,
        second=_SIDE,
        seed={"type": "integer"},
        resamples={"type": "integer"},
    ),
)
async def compare_configurations(
    body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Two configurations, of one evaluation or of two, on the items that both answered."""
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be an object", param="body")
    given = checks.known(body, ("first", "second", "seed", "resamples"), "")
    options = {
        "seed": checks.integer(given.get("seed", 0), "seed", 0, checks.EXACT),
        "resamples": checks.integer(
            given.get("resamples", 10_000), "resamples", RESAMPLES_MIN, RESAMPLES_MAX
        ),
    }
    sides = [await _side(context, principal, body.get(name), name) for name in ("first", "second")]
    return await context.evaluation_reader.compare(sides[0], sides[1], **options)


async def _side(context: Context, principal: Principal, value: Any, name: str) -> tuple[Any, Any]:
    if value is None:
        raise MissingParameter(f"{name} is required", param=name)
    fields = ("evaluation", "configuration")
    given = checks.known(value, fields, f"{name}.") if isinstance(value, dict) else {}
    if set(given) != set(fields) or not all(isinstance(v, str) for v in given.values()):
        raise InvalidParameter(
            f"{name} must be an object of evaluation and configuration, both strings", param=name
        )
    row = await context.evaluations.get(value["evaluation"], principal.tenant)
    return row, await context.evaluations.run(
        row.id, value["configuration"], f"{name}.configuration"
    )


@router.get("/options")
async def evaluation_options(context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """The datasets that `bundled` names, with their columns, and the types of graders that are
    allowed here.
    """
    return await asyncio.to_thread(context.evaluations.options)


@router.get("/{evaluation_id}")
async def get_evaluation(
    evaluation_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Progress, and results as they are by now."""
    return await context.evaluation_reader.show(
        await context.evaluations.get(evaluation_id, principal.tenant)
    )


@router.get("/{evaluation_id}/events")
async def evaluation_events(
    evaluation_id: str, context: ContextDep, principal: PrincipalDep
) -> EventSourceResponse:
    """Server-sent events: `evaluation` with the same object whenever it changed, `done` with it
    once it is over.
    """

    async def read() -> dict[str, Any]:
        row = await context.evaluations.get(evaluation_id, principal.tenant)
        return await context.evaluation_reader.show(row)

    await context.evaluations.get(
        evaluation_id, principal.tenant
    )  # an unknown one is 404, not an empty stream
    key = (evaluation_id, principal.tenant)
    events = context.changes.follow(
        "evaluation", key, read, is_over=lambda shown: shown["status"] not in OPEN
    )
    return FollowingStream(events, context.followers.enter(principal))


@router.delete("/{evaluation_id}")
async def delete_evaluation(
    evaluation_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Remove it with its items and grades; not while it runs. Its jobs stay, as jobs do."""
    await context.evaluations.remove(evaluation_id, principal.tenant)
    return {"id": evaluation_id, "object": "evaluation", "deleted": True}


@router.post(
    "/{evaluation_id}/configurations",
    openapi_extra=_body("configurations", configurations=_CONFIGURATIONS),
)
async def add_configurations(
    evaluation_id: str, body: JsonBody, context: ContextDep, principal: PrincipalDep
) -> Response:
    """More configurations, or more seeds of one; only what is missing runs."""
    if not isinstance(body, dict):
        raise InvalidParameter("the body must be an object", param="body")
    if "configurations" not in checks.known(body, ("configurations",), ""):
        raise MissingParameter("configurations is required", param="configurations")
    configurations = parse_configurations(body["configurations"])
    return await _told(
        context, await context.evaluations.add(evaluation_id, configurations, principal)
    )


@router.post("/{evaluation_id}/cancel")
async def cancel_evaluation(
    evaluation_id: str, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Stop what has not ended; what is graded stays. Creating it again goes on where it stopped."""
    row = await context.evaluations.cancel(evaluation_id, principal.tenant)
    return await context.evaluation_reader.show(row)


@router.get("/{evaluation_id}/items")
async def list_items(
    request: Request,
    evaluation_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    configuration: str | None = None,
    outcome: str | None = None,
    cursor: str | None = None,
    limit: str | None = None,
) -> dict[str, Any]:
    """Graded answers, also while it runs: errors first, then what failed, then what passed;
    `next_cursor` goes on. Their texts are at `urls.self` of each.
    """
    no_nul(request)
    if outcome is not None and outcome not in OUTCOMES:
        raise InvalidParameter(f"outcome must be one of {', '.join(OUTCOMES)}", param="outcome")
    size = page_limit(limit, DEFAULT_ITEMS, MAX_ITEMS)
    rows = await context.evaluations.samples(
        evaluation_id,
        principal.tenant,
        configuration=configuration,
        outcome=outcome,
        after=_place(cursor),
        limit=size,
    )
    page = rows[:size]
    more = len(rows) > size
    last = (
        f"{page[-1].outcome}.{page[-1].item}.{page[-1].position}.{page[-1].repeat}"
        if more
        else None
    )
    return {
        "object": "list",
        "data": [listed_item(row) for row in page],
        "has_more": more,
        "next_cursor": last,
    }


@router.get("/{evaluation_id}/items/{item}")
async def get_item(
    request: Request,
    evaluation_id: str,
    item: str,
    context: ContextDep,
    principal: PrincipalDep,
    configuration: str | None = None,
    repeat: str = "0",
) -> dict[str, Any]:
    """One graded answer: the item's data, the answer's text, what each grader said."""
    no_nul(request)
    if configuration is None:
        raise MissingParameter("configuration is required", param="configuration")
    numbers = {}
    for name, given in (("item", item), ("repeat", repeat)):
        number = whole_number(given)
        if number is None:
            raise InvalidParameter(f"{name} must be a whole number", param=name)
        numbers[name] = number
    return item_object(
        await context.evaluations.sample(
            evaluation_id, principal.tenant, configuration=configuration, **numbers
        )
    )


def _place(cursor: str | None) -> Place | None:
    if cursor is None:
        return None
    outcome, *numbers = cursor.split(".")
    if (
        outcome in OUTCOMES
        and len(numbers) == 3
        and all(n.isascii() and n.isdecimal() and len(n) <= 9 for n in numbers)
    ):
        return outcome, int(numbers[0]), int(numbers[1]), int(numbers[2])
    raise InvalidParameter("cursor must be the next_cursor of another page", param="cursor")


@router.get("/{evaluation_id}/report")
async def get_report(
    request: Request,
    evaluation_id: str,
    context: ContextDep,
    principal: PrincipalDep,
    format: str | None = None,
) -> Response:
    """Results, comparisons and items that did not pass: JSON, Markdown or one HTML page, as
    `format` or `Accept` says.
    """
    if format is not None and format not in reports.FORMATS:
        raise InvalidParameter(
            f"format must be one of {', '.join(reports.FORMATS)}", param="format"
        )
    kind = format or accepted(request.headers.get("accept", ""))
    row = await context.evaluations.get(evaluation_id, principal.tenant)
    made = await context.evaluation_reader.report(row)
    if kind == "json":
        return JSONResponse(made)
    text = await asyncio.to_thread(reports.markdown if kind == "markdown" else reports.page, made)
    # The page has texts of a model; whatever they are, they are no part of this site.
    headers = {
        "Content-Security-Policy": f"{reports.POLICY}; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    return PlainTextResponse(text, media_type=reports.FORMATS[kind], headers=headers)


def accepted(header: str) -> str:
    """The format that an Accept header likes best; JSON when it says nothing that we have."""
    names = {media: name for name, media in reports.FORMATS.items()}
    best, liked = "json", 0.0
    for part in header.split(","):
        media, *options = (piece.strip() for piece in part.lower().split(";"))
        weight = next((o[2:] for o in options if o.startswith("q=")), "1")
        quality = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
        if media in names and quality > liked:
            best, liked = names[media], quality
    return best
