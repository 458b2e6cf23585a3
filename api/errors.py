"""One error body for everything: RFC 9457's problem object and OpenAI's error in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from api.paths import route_path
from shared.db.session import is_outage
from shared.errors import RETRY_AFTER_MAX_SECONDS, NotAuthenticated, TooManyRequests, VDiffError
from shared.links import link
from shared.metrics import ERRORS

log = structlog.get_logger(__name__)

PATH_SHOWN = 200  # characters of an unknown path, in a message
ALIKE = (
    0.75  # from 0 to 1: how much of a path must be a route's, for the route to be what was meant
)
SHOWN_STATEMENT = 300  # characters of a refused statement, in the log

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_type(status: int) -> str:
    """OpenAI's `error.type`."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def problem(
    status: int,
    message: str,
    *,
    code: str,
    param: str | None,
    instance: str,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> JSONResponse:
    """The answer; counts it in vdiff_errors_total. `more` are members of its own, as RFC 9457
    allows.
    """
    ERRORS.labels(code=code).inc()
    body = {
        "type": f"urn:vdiff:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": message,
        "instance": instance,
        "error": {"message": message, "type": error_type(status), "param": param, "code": code},
        **(more or {}),
    }
    return JSONResponse(body, status, dict(headers or {}), media_type="application/problem+json")


def path_of(loc: tuple[Any, ...]) -> str | None:
    """A validation error's place as a full name: messages[0].content."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("body", "query", "path", "header"):
            text += f".{part}" if text else str(part)
    return text or None


def wrong_with(kind: str, bounds: Mapping[str, Any]) -> str:
    """Return what a value must be, in our words, from the kind of a validation error and its
    bounds.
    """
    if kind == "missing":
        return "is required"
    for name, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if name in bounds:
            return f"must be {text} {bounds[name]}"
    if kind in ("literal_error", "enum"):
        return f"must be one of {bounds.get('expected', 'its values')}".replace("'", "").replace(
            " or ", ", "
        )
    for part, text in _KINDS:
        if part in kind:
            return f"must be {text}"
    return "has a value that is not allowed"


_KINDS = (
    ("int", "an integer within its bounds"),
    ("float", "a number"),
    ("bool", "true or false"),
    ("string", "a string"),
    ("list", "a list"),
    ("dict", "an object"),
    ("model", "an object"),
    ("date", "a time"),
    ("json", "valid JSON"),
)


def from_vdiff(request: Request, exc: VDiffError) -> JSONResponse:
    headers = {"Retry-After": "5"} if exc.retryable else {}
    if isinstance(exc, TooManyRequests):
        wait = min(max(1, math.ceil(exc.retry_after_seconds)), RETRY_AFTER_MAX_SECONDS)
        headers = {"Retry-After": str(wait), **exc.headers}
    elif isinstance(exc, NotAuthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(
        exc.http_status,
        exc.message,
        code=exc.code,
        param=exc.param,
        instance=request.url.path,
        headers=headers,
    )


def job_headers(request: Request) -> dict[str, str]:
    """Return the headers that name the job that was stored before the error; the client can still
    ask for it.
    """
    job_id = request.scope.get("state", {}).get("job_id")
    return {"X-Job-Id": job_id, "Location": link(f"/v1/jobs/{job_id}")} if job_id else {}


def available(app: FastAPI) -> list[str]:
    """Every route as `METHOD /path`."""
    return [f"{method} {path}" for path, methods in paths(app).items() for method in methods]


def paths(app: FastAPI) -> dict[str, list[str]]:
    """The methods of every documented path, by its template."""
    return {
        path: [name.upper() for name in methods] for path, methods in app.openapi()["paths"].items()
    }


def filled(template: str, path: str) -> tuple[str, str, str]:
    """The template with the path's own words where it has names, and both without those: what must
    be alike.
    """
    wanted, given = template.split("/"), path.split("/")
    if len(wanted) != len(given):
        return template, template, path
    pairs = list(zip(wanted, given, strict=True))
    fixed = [pair for pair in pairs if not pair[0].startswith("{")]
    whole = "/".join(word if name.startswith("{") else name for name, word in pairs)
    return whole, "/".join(name for name, _ in fixed), "/".join(word for _, word in fixed)


def nearest(templates: Iterable[str], path: str) -> str | None:
    """The route that was meant, perhaps; None when none is nearly it."""
    if len(path) > PATH_SHOWN:
        return None
    scored = [
        (SequenceMatcher(None, wanted, given).ratio(), whole)
        for whole, wanted, given in (filled(template, path) for template in templates)
    ]
    score, found = max(scored, key=lambda one: one[0])
    return found if score >= ALIKE else None


def not_found(app: FastAPI, request: Request) -> tuple[str, dict[str, Any]]:
    """Return the error for an unknown path; name the counterpart here of a path of another server."""
    path = route_path(request.scope)
    near = nearest(paths(app), path)
    hint = f"; did you mean {near}?" if near else ";"
    where = "`available` in this answer lists every route, /docs explains them"
    return f"{request.method} {path[:PATH_SHOWN]} is not served{hint} {where}", {
        "available": available(app)
    }


def not_allowed(app: FastAPI, request: Request, named: str) -> tuple[str, dict[str, str]]:
    """Return the error for a method that the path does not have, and the Allow header. `named` is
    that of the first route alone.
    """
    path = route_path(request.scope)
    found = {name.strip() for name in named.split(",") if name.strip()}
    for template, methods in paths(app).items():
        if filled(template, path)[0] == path:
            found.update(methods)
    allow = ", ".join(sorted(found))
    return f"{request.method} {path} is not allowed; this path takes {allow}", {"Allow": allow}


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(VDiffError)
    async def on_vdiff(request: Request, exc: VDiffError) -> JSONResponse:
        return from_vdiff(request, exc)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        first = exc.errors()[0]
        param = path_of(tuple(first["loc"]))
        message = f"{param} {wrong_with(first['type'], first.get('ctx') or {})}"
        return problem(
            400, message, code="invalid_parameter", param=param, instance=request.url.path
        )

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, exc: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
        detail, headers, more = (
            f"{request.method} {request.url.path}: {exc.detail}",
            dict(exc.headers or {}),
            None,
        )
        if exc.status_code == HTTPStatus.NOT_FOUND:
            detail, more = not_found(app, request)
        elif exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail, allow = not_allowed(app, request, headers.pop("Allow", ""))
            headers |= allow
        return problem(
            exc.status_code,
            detail,
            code=code,
            param=None,
            instance=request.url.path,
            headers=headers,
            more=more,
        )

    def refused(request: Request, exc: Exception) -> JSONResponse:
        """A statement that the database does not take, which is a bug; its parameters, a prompt
        maybe, are not logged.
        """
        driver = getattr(exc, "orig", None)
        log.error(
            "database_refused",
            error=type(exc).__name__,
            sqlstate=getattr(driver, "sqlstate", None),
            statement=(getattr(exc, "statement", None) or "")[:SHOWN_STATEMENT],
            path=request.url.path,
            exc_info=exc,
        )
        return problem(
            500,
            "internal error",
            code="internal_error",
            param=None,
            instance=request.url.path,
            headers=job_headers(request),
        )

    @app.exception_handler(SQLAlchemyError)
    @app.exception_handler(OSError)
    async def on_database(request: Request, exc: Exception) -> JSONResponse:
        if not is_outage(exc):
            return refused(request, exc)
        log.error("database_unavailable", error=type(exc).__name__, path=request.url.path)
        return problem(
            503,
            "the database does not answer; try again",
            code="database_unavailable",
            param=None,
            instance=request.url.path,
            headers={"Retry-After": "5", **job_headers(request)},
        )

    @app.exception_handler(Exception)
    async def on_bug(request: Request, exc: Exception) -> JSONResponse:
        log.exception("unhandled", path=request.url.path)
        # Starlette answers this one outside of all middleware, RequestIDMiddleware too.
        request_id = request.scope.get("state", {}).get("request_id")
        return problem(
            500,
            "internal error",
            code="internal_error",
            param=None,
            instance=request.url.path,
            headers={
                **job_headers(request),
                **({"X-Request-ID": request_id} if request_id else {}),
            },
        )
