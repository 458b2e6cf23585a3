"""Middleware around every request: its id, size limit, log line and metrics. Plain ASGI, so that
streams stay streams.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import problem
from api.paths import route_path
from shared import tracing
from shared.ids import new_id
from shared.metrics import LATENCY, REQUESTS

log = structlog.get_logger("vdiff.access")
QUIET = ("/health", "/metrics")
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing


class TooLarge(Exception):
    """The body outgrew the limit while it was read."""


class BodyLimitMiddleware:
    """413 for bodies beyond the limit, with and without Content-Length. `larger` are limits of
    paths that stream theirs.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, larger: Mapping[str, int] | None = None
    ) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.larger = dict(larger or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.larger.get(route_path(scope), self.max_bytes)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
            await self._refusal(scope, most)(scope, receive, send)
            return
        seen = 0
        started = False

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise TooLarge
            return message

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, limited, noting)
        except TooLarge:
            if started:
                raise
            await self._refusal(scope, most)(scope, receive, send)

    def _refusal(self, scope: Scope, most: int) -> JSONResponse:
        message = f"the body is larger than {most} bytes"
        return problem(413, message, code="body_too_large", param="body", instance=scope["path"])


class CrossSiteMiddleware:
    """Answer 403 to a request that a page of another site makes a browser send without a key.

    On loopback no key is needed, so any page could otherwise submit jobs and register webhooks
    here. Browsers name the site in `Sec-Fetch-Site` (https://www.w3.org/TR/fetch-metadata/), older
    ones in `Origin`; a page can forge neither, and other clients send neither.

    Args:
        allowed: origins whose pages may (`VDIFF_CORS_ORIGINS`).
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self.app, self.allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in SAFE:
            headers = Headers(scope=scope)
            if (param := self._named_by(headers)) is not None and "authorization" not in headers:
                message = "a page of another site may not send this without a key"
                refusal = problem(
                    403, message, code="cross_site", param=param, instance=scope["path"]
                )
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _named_by(self, headers: Headers) -> str | None:
        """Return the header that names another site, or None."""
        origin = headers.get("origin")
        if origin is not None and ("*" in self.allowed or origin in self.allowed):
            return None
        if "sec-fetch-site" in headers:
            return (
                "sec-fetch-site"
                if headers["sec-fetch-site"] in ("cross-site", "same-site")
                else None
            )
        return None if origin is None or is_same_host(origin, headers.get("host", "")) else "origin"


def is_same_host(origin: str, host: str) -> bool:
    """Return whether a page of this origin came from the host that it now asks."""
    try:
        page, asked = urlsplit(origin), urlsplit(f"//{host}")
        usual = {"http": 80, "https": 443}[page.scheme]
        return bool(page.hostname) and (page.hostname, page.port or usual) == (
            asked.hostname,
            asked.port or usual,
        )
    except (KeyError, ValueError):  # `null`, another scheme, no port
        return False


class RateHeadersMiddleware:
    """Puts the limits that `api.auth` counted on whatever answer there is, streams and errors
    included.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in scope.get("state", {}).get("rate_headers", {}).items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_limits)


class RequestIDMiddleware:
    """X-Request-ID: the client's if it is short and plain, else a new one; in the answer and in
    every log line.

    And the client's `traceparent`, for the jobs that this request makes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = (
            given
            if 0 < len(given) <= 128 and given.isascii() and given.isprintable()
            else new_id("req")
        )
        scope.setdefault("state", {})["request_id"] = request_id
        tracing.remember(Headers(scope=scope).get(tracing.HEADER, ""))

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self.app(scope, receive, with_id)


class LoggingMiddleware:
    """One log line and the metrics of each request. No body, no query, no header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, path = time.perf_counter(), 500, route_path(scope)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unmatched")
            REQUESTS.labels(method=scope["method"], route=route, status=status).inc()
            LATENCY.labels(route=route).observe(seconds)
            # Probes come every few seconds and say nothing.
            write = log.debug if path.startswith(QUIET) and status in (200, 503) else log.info
            write(
                "request",
                method=scope["method"],
                path=path,
                status=status,
                ms=round(1000 * seconds, 1),
            )
