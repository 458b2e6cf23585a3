"""The web page at `/`: static files from this package, which talk to the public API and to nothing
else.

No build and no foreign host (docs/adr): ES modules, and lit-html in static/vendor. The page may
load only what is served here (Content-Security-Policy), so that text of a prompt or an answer is
text, whatever it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # asked again each time, and answered 304: an upgrade shows at once
    "Cache-Control": "no-cache",
}
# Swagger UI's style sheet has its icons as data URLs.
DOCS_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": POLICY.replace("img-src 'self'", "img-src 'self' data:"),
}


class Files(StaticFiles):
    """Static files with our headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def install(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/dashboard`."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        """Return Swagger UI, from this package: no other host is asked, and it works offline."""
        return FileResponse(STATIC / "docs.html", headers=DOCS_HEADERS)

    app.mount("/dashboard", Files(directory=STATIC), name="dashboard")
