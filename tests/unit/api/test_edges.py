"""The edges of the API without a server: strict JSON, error bodies, body limit, request ids, log
lines and metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError, OperationalError

from api import errors
from api.dependencies import JsonBody, idempotency_key, is_automatic_retry
from api.middleware import (
    BodyLimitMiddleware,
    CrossSiteMiddleware,
    LoggingMiddleware,
    RequestIDMiddleware,
)
from api.routes.jobs import preferred_wait, wait_seconds
from shared.errors import InvalidBody, InvalidParameter, TooManyRequests
from shared.metrics import ERRORS, REQUESTS
from shared.strict_json import parse_json

JSON_TYPE = {"content-type": "application/json"}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(
                st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(JSON)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_an_error_that_says_what(raw: bytes) -> None:
    try:
        parse_json(raw)
    except InvalidBody as exc:
        assert exc.param
        assert exc.code in ("invalid_json", "invalid_utf8", "invalid_characters")


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"\xff", "invalid_utf8", "body"),
        (b"{", "invalid_json", "body"),
        (b'{"a": NaN}', "invalid_json", "body"),
        (b'{"a": -Infinity}', "invalid_json", "body"),
        (b'{"a": 1e999}', "invalid_json", "body"),
        (b"[" * 200_000, "invalid_json", "body"),
        (b"9" * 5000, "invalid_json", "body"),
        (b'"\\u0000"', "invalid_characters", "body"),
        (b'{"a": {"b": ["x", "\\ud800"]}}', "invalid_characters", "a.b[1]"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "invalid_json", "b"),
        (b'[{"\\ud800": 1, "\\ud800": 2}]', "invalid_json", "body"),
        (b'{"a\\u0000": 1}', "invalid_characters", "body"),
        (b'{"a": {"b\\udfff": 1}}', "invalid_characters", "a"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json(raw: bytes, code: str, param: str) -> None:
    with pytest.raises(InvalidBody) as wrong:
        parse_json(raw)
    assert (wrong.value.code, wrong.value.param) == (code, param)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def request(**headers: str) -> Request:
    raw = [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return Request(
        {"type": "http", "method": "POST", "path": "/", "headers": raw, "query_string": b""}
    )


def test_idempotency_keys() -> None:
    assert idempotency_key(request()) is None
    assert idempotency_key(request(idempotency_key="k")) == "k"
    for bad in ("", "k" * 256, "\xe9", "a\tb"):
        with pytest.raises(InvalidParameter) as wrong:
            idempotency_key(request(idempotency_key=bad))
        assert wrong.value.param == "Idempotency-Key"


def test_the_sdks_retry_count() -> None:
    counts = {
        "0": False,
        "1": True,
        "12": True,
        "-1": False,
        "x": False,
        "\xb2": False,
        "9" * 5000: True,
    }
    assert {c: is_automatic_retry(request(x_stainless_retry_count=c)) for c in counts} == counts
    assert not is_automatic_retry(request())


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("wait=5", 5.0),
        ("respond-async, wait=5", 5.0),
        ("wait=5; foo", 5.0),
        ("wait=1000", 60.0),
        ("wait=0", 0.0),
        ("", None),
        ("wait", None),
        ("wait=x", None),
        ("wait=-1", None),
        ("await=5", None),
        ("wait=1.5", None),
    ],
)
def test_prefer_wait(prefer: str, seconds: float | None) -> None:
    assert preferred_wait(request(prefer=prefer), 60.0) == seconds


def test_the_querys_wait() -> None:
    assert wait_seconds(None, 60) == 0
    assert wait_seconds("30", 60) == 30
    assert wait_seconds("0.5", 60) == 0.5
    for bad in ("61", "-1", "nan", "inf", "x", ""):
        with pytest.raises(InvalidParameter) as wrong:
            wait_seconds(bad, 60)
        assert wrong.value.param == "wait"


class Item(BaseModel):
    names: list[int]


def application() -> FastAPI:
    app = FastAPI()
    errors.install(app)

    @app.post("/echo")
    async def echo(body: JsonBody) -> Any:
        return body

    @app.post("/model")
    async def model(body: Item) -> Any:
        return body

    @app.get("/thing/{name}")
    @app.delete("/thing/{name}")
    async def thing(name: str) -> None:
        pass

    @app.get("/busy/{name}")
    async def busy(name: str) -> None:
        raise TooManyRequests("later", param="tenant")

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("secret detail")

    @app.get("/database")
    async def database() -> None:
        raise OperationalError("SELECT secret", {}, Exception("gone"))

    @app.get("/stored")
    async def stored(request: Request) -> None:
        request.state.job_id = "job_1"
        raise OperationalError("SELECT secret", {}, Exception("gone"))

    @app.get("/refused")
    async def refused() -> None:
        driver = Exception("Failing row contains (secret)")
        driver.sqlstate = "23514"  # type: ignore[attr-defined]
        raise IntegrityError("INSERT INTO jobs VALUES (:body)", {"body": "secret"}, driver)

    app.add_middleware(BodyLimitMiddleware, max_bytes=1024)
    app.add_middleware(CrossSiteMiddleware, allowed=["https://app.example"])
    app.add_middleware(LoggingMiddleware)
    app.add_middleware(RequestIDMiddleware)
    return app


@pytest.fixture
async def client() -> Any:
    transport = httpx.ASGITransport(application(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
        yield made


def problem_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    more = {"available"} if body["error"]["code"] == "not_found" else set()
    assert set(body) == {"type", "title", "status", "detail", "instance", "error", *more}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["status"] == answer.status_code
    assert body["type"] == f"urn:vdiff:error:{body['error']['code']}"
    assert body["detail"] == body["error"]["message"]
    assert body["instance"] == answer.request.url.path
    assert answer.headers["x-request-id"]
    return body["error"]  # type: ignore[no-any-return]


async def test_every_error_has_the_one_body(client: httpx.AsyncClient) -> None:
    busy = await client.get("/busy/x")
    assert problem_of(busy) == {
        "message": "later",
        "type": "rate_limit_error",
        "param": "tenant",
        "code": "rate_limit_exceeded",
    }
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "5")
    wrong = await client.post("/model", json={"names": [1, "x"]})
    assert (wrong.status_code, problem_of(wrong)["param"]) == (400, "names[1]")
    missing = await client.get("/none")
    assert problem_of(missing)["code"] == "not_found"
    assert "POST /model" in missing.json()["available"]
    assert missing.json()["detail"].startswith(
        "GET /none is not served; `available` in this answer lists every route"
    )
    method = await client.get("/echo")
    assert (method.status_code, problem_of(method)["code"], method.headers["allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/job", "/v1/jobs"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/jobz/job_1", "/v1/jobs/job_1"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/jobs/job_1/event", "/v1/jobs/job_1/events"),
        ("/v1/embeddings", None),
        ("/v1/images/generations", None),
        ("/v1/audio/speech", None),
        ("/" + "v1/job" * 900, None),
    ],
)
def test_a_path_that_is_nearly_a_route(path: str, meant: str | None) -> None:
    """An id in it makes no two paths alike."""
    routes = [
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/events",
        "/v1/chat/completions",
        "/v1/files/{file_id}",
        "/v1/evaluations/{evaluation_id}",
    ]
    assert errors.nearest(routes, path) == meant


async def test_a_method_that_a_path_has_not(client: httpx.AsyncClient) -> None:
    """All that it has are named, also those of another route of the same path."""
    answer = await client.put("/thing/7")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    assert (
        problem_of(answer)["message"] == "PUT /thing/7 is not allowed; this path takes DELETE, GET"
    )


async def test_an_error_of_ours_tells_no_secrets(client: httpx.AsyncClient) -> None:
    bug = await client.get("/bug")
    assert (bug.status_code, problem_of(bug)) == (
        500,
        {
            "message": "internal error",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        },
    )
    away = await client.get("/database")
    assert (away.status_code, problem_of(away)["code"], away.headers["retry-after"]) == (
        503,
        "database_unavailable",
        "5",
    )
    assert "secret" not in bug.text + away.text
    # Once a job is stored, it is told with whatever goes wrong then: it goes on.
    stored = await client.get("/stored")
    assert (stored.status_code, stored.headers["x-job-id"], stored.headers["location"]) == (
        503,
        "job_1",
        "/v1/jobs/job_1",
    )
    assert "x-job-id" not in away.headers
    with structlog.testing.capture_logs() as logs:
        refused = await client.get("/refused")
    assert (refused.status_code, problem_of(refused)["code"]) == (500, "internal_error")
    said = next(line for line in logs if line["event"] == "database_refused")
    assert (said["sqlstate"], said["statement"]) == ("23514", "INSERT INTO jobs VALUES (:body)")
    assert isinstance(said["exc_info"], IntegrityError) and "secret" not in refused.text


async def test_errors_are_counted(client: httpx.AsyncClient) -> None:
    before = ERRORS.labels(code="rate_limit_exceeded")._value.get()
    await client.get("/busy/x")
    assert ERRORS.labels(code="rate_limit_exceeded")._value.get() == before + 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_beyond_the_limit(client: httpx.AsyncClient, chunked: bool) -> None:
    async def pieces(size: int) -> Any:
        for _ in range(size // 512):
            yield b" " * 512

    whole = json.dumps("x" * 1022)
    assert (
        await client.post("/echo", content=whole, headers=JSON_TYPE)
    ).json() == "x" * 1022  # exactly the limit
    answer = await client.post("/echo", content=pieces(4096) if chunked else b" " * 1025)
    assert (answer.status_code, problem_of(answer)["param"], problem_of(answer)["code"]) == (
        413,
        "body",
        "body_too_large",
    )


async def test_refusals_of_a_fine_body_are_not_counted(client: httpx.AsyncClient) -> None:
    before = ERRORS.labels(code="body_too_large")._value.get()
    assert (await client.post("/echo", json={})).status_code == 200
    assert ERRORS.labels(code="body_too_large")._value.get() == before


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "application/x+json"]
)
async def test_kinds_of_content(client: httpx.AsyncClient, content_type: str) -> None:
    headers = {"content-type": content_type}
    assert (await client.post("/echo", content=b"[1]", headers=headers)).json() == [1]
    answer = await client.post("/echo", content=b"[1]", headers={"content-type": "text/plain"})
    assert (answer.status_code, problem_of(answer)["param"]) == (415, "content-type")
    empty = await client.post("/echo", content=b"", headers=headers)
    assert (empty.status_code, problem_of(empty)["param"]) == (400, "body")


@pytest.mark.parametrize(
    ("site", "more", "status"),
    [
        (None, {}, 200),
        ("same-origin", {}, 200),
        ("none", {}, 200),
        ("cross-site", {}, 403),
        ("same-site", {}, 403),
        ("cross-site", {"authorization": "Bearer a-key"}, 200),
        (None, {"origin": "https://evil.example"}, 403),
        (None, {"origin": "null"}, 403),
        (None, {"origin": ""}, 403),
        (None, {"origin": "http://test"}, 200),
        (None, {"origin": "https://test"}, 200),
        (None, {"origin": "http://test:80"}, 200),
        (None, {"origin": "http://test:81"}, 403),
        (None, {"origin": "http://test.evil.example"}, 403),
        (None, {"origin": "http://evil.example@test:x"}, 403),
        (None, {"origin": "http://[::1"}, 403),
        (None, {"origin": "https://evil.example", "authorization": "Bearer a-key"}, 200),
        (None, {"origin": "https://app.example"}, 200),
        ("cross-site", {"origin": "https://app.example"}, 200),
        ("same-origin", {"origin": "https://evil.example"}, 200),
    ],
)
async def test_pages_of_other_sites(
    client: httpx.AsyncClient, site: str | None, more: dict[str, str], status: int
) -> None:
    """A page that somebody opens must not submit jobs to a server on loopback, which needs no key."""
    headers = {**({} if site is None else {"sec-fetch-site": site}), **more}
    answer = await client.post("/echo", content=b"{}", headers={**JSON_TYPE, **headers})
    assert answer.status_code == status
    if status == 403:
        assert problem_of(answer)["code"] == "cross_site"
    assert (
        await client.get("/nothing", headers=headers)
    ).status_code == 404  # what changes nothing is not refused


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a\x7fb", False)],
)
async def test_request_ids(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    answer = await client.post("/echo", json={}, headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) == kept
    assert kept or answer.headers["x-request-id"].startswith("req_")


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def test_a_request_is_one_line_and_one_count(
    logged: list[Any], client: httpx.AsyncClient
) -> None:
    labels = {"method": "GET", "route": "/busy/{name}", "status": 429}
    before = REQUESTS.labels(**labels)._value.get()
    await client.get("/busy/alice?key=secret", headers={"authorization": "secret"})
    assert REQUESTS.labels(**labels)._value.get() == before + 1
    (line,) = [x for x in logged if x["event"] == "request"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/busy/alice", 429)
    assert "secret" not in str(line)


async def test_unknown_paths_do_not_make_metrics_of_their_own(client: httpx.AsyncClient) -> None:
    before = REQUESTS.labels(method="GET", route="unmatched", status=404)._value.get()
    for i in range(3):
        await client.get(f"/none/{i}")
    assert REQUESTS.labels(method="GET", route="unmatched", status=404)._value.get() == before + 3
