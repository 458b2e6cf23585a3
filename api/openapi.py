"""Error answers of the OpenAPI document. FastAPI knows the good answers. Rules here decide which
errors a route can give, so that no route can forget one. `tests/integration/test_openapi.py` sends
whatever the document allows, and much that it does not.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from shared.jobs.responses import CHAT, COMPLETIONS, INFILL, LOGLIKELIHOOD

MEANINGS = {
    400: "a field is wrong; `error.param` names it",
    401: "a key is needed, and this is none",
    403: "the key lacks the scope",
    404: "there is no such thing, or it is another tenant's",
    409: "not in this state",
    410: "it was purged, or its content is gone",
    413: "the body is too large",
    415: "the body is not of the kind that is read here",
    422: "the Idempotency-Key was used with another body",
    429: "beyond a limit; `Retry-After` says when to come again",
    500: "the job failed; `error.code` says why",
    503: "PostgreSQL or the file store does not answer, or the process stops; try again",
    504: "not done in time; the job goes on at `Location`",
}
SYNC = (
    CHAT,
    COMPLETIONS,
    INFILL,
    LOGLIKELIHOOD,
    "/v1/responses",
)  # requests that wait for their job
_KEYED = (
    *SYNC,
    "/v1/jobs",
    "/v1/jobs/{job_id}/replay",
    "/v1/batches",
    "/v1/evaluations",
)  # POST reads Idempotency-Key
STREAM = "text/event-stream"
_TEXTS = {"/metrics": "text/plain", "/v1/files/{file_id}/content": "application/octet-stream"}
_ALSO = {  # good answers beyond the one that the route declares
    ("post", "/v1/jobs"): (200,),
    ("post", "/v1/jobs/{job_id}/cancel"): (200,),
    ("post", "/v1/jobs/{job_id}/replay"): (200,),
    ("get", "/v1/jobs/{job_id}"): (304,),
}

PROBLEM = {
    "type": "object",
    "description": "RFC 9457's problem with OpenAI's error in it",
    "required": ["type", "title", "status", "detail", "instance", "error"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "title", "detail", "instance")},
        "status": {"type": "integer"},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                **{name: {"type": "string"} for name in ("message", "type", "code")},
                "param": {"type": ["string", "null"]},
            },
        },
    },
}


_TOKENIZER = (
    "/tokenizer_info",
    "/tokenize",
    "/detokenize",
)  # lm-eval's paths, and keyed like those under /v1


def errors_of(method: str, path: str, *, has_body: bool) -> set[int]:
    """The statuses of errors that an operation may answer with. Pure."""
    if not path.startswith("/v1/") and path not in _TOKENIZER:
        return (
            {401, 403, 429, 503}
            if path == "/metrics"
            else {503}
            if path.startswith("/health")
            else set()
        )
    found = {400, 401, 403, 429, 503}
    if (
        "{" in path or has_body or method == "get"
    ):  # also a model, a file or an endpoint that a body or a query names
        found.add(404)
    if (
        method in ("post", "delete") or "}/" in path
    ):  # also to be read only once it is over: a result, steps, a report
        found.add(409)
    if has_body:
        found |= {413, 415}
    if path.startswith(("/v1/jobs", "/v1/files", "/v1/batches", "/v1/responses")) or path in SYNC:
        found.add(410)
    if method == "post" and path in _KEYED:
        found.add(422)
    if method == "post" and path in SYNC:
        found |= {500, 504}
    return found


def document(app: FastAPI) -> None:
    """Have `app.openapi()` tell errors as they are."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = plain()
            described.setdefault("components", {}).setdefault("schemas", {})["Problem"] = PROBLEM
            for path, operations in described["paths"].items():
                for method, operation in operations.items():
                    _describe(method, path, operation)
            app.openapi_schema = described
        return app.openapi_schema

    # A method put in the place of another, as FastAPI documents it; mypy knows no such thing.
    app.openapi = openapi  # type: ignore[method-assign]


def _describe(method: str, path: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's own: ours is 400
    for status in _ALSO.get((method, path), ()):
        answers[str(status)] = {"description": HTTPStatus(status).phrase}
    if path.endswith("/events"):
        answers["200"]["content"] = {STREAM: {"schema": {"type": "string"}}}
    elif method == "post" and path in SYNC:
        answers["200"]["content"][STREAM] = {"schema": {"type": "string"}}  # with `stream: true`
    elif path in _TEXTS:
        answers["200"]["content"] = {_TEXTS[path]: {"schema": {"type": "string"}}}
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for status in sorted(errors_of(method, path, has_body="requestBody" in operation)):
        answers[str(status)] = {"description": MEANINGS[status], "content": content}
