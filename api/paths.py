"""Paths and methods, before any route is looked for: a proxy's prefix, and HEAD. Plain ASGI."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def route_path(scope: Scope) -> str:
    """Return the path without the proxy's prefix, as the routes have it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class PrefixMiddleware:
    """Serves the API below `VDIFF_ROOT_PATH`, whether the proxy in front passes the prefix on or
    strips it.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if (
                path == self.prefix
            ):  # the page's own links are relative, so its path ends with a slash
                await Response(status_code=308, headers={"Location": f"{self.prefix}/"})(
                    scope, receive, send
                )
                return
            if not path.startswith(f"{self.prefix}/"):
                path = self.prefix + path
            scope["root_path"], scope["path"] = self.prefix, path
        await self.app(scope, receive, send)


class HeadMiddleware:
    """Answers HEAD as GET would, without the body; a stream ends where its first event would begin."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        begun = asyncio.Event()

        async def only_the_head(message: Message) -> None:
            if message["type"] == "http.response.start" and not begun.is_set():
                begun.set()
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        get = {
            **scope,
            "method": "GET",
        }  # a copy: the server reads its own to know that no body follows
        answering = asyncio.ensure_future(self.app(get, receive, only_the_head))
        waiting = asyncio.ensure_future(begun.wait())
        try:
            await asyncio.wait((answering, waiting), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if "route" in get:
                scope["route"] = get["route"]  # for the log and the metrics
            over = answering.done()
            for task in (waiting, answering):
                task.cancel()
            await asyncio.gather(waiting, answering, return_exceptions=True)
        if over:
            answering.result()  # raises what the application raised
