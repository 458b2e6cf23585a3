"""The HTTP edge of a running API: HEAD, slashes, a path prefix, CORS, host names, the page at
/docs, and error texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.app import EXPOSED, create_app
from api.dashboard import STATIC
from shared.settings import load_settings
from tests.integration.conftest import ApiProcess, Jobs, jobs_with_database, register_tiny

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CHAT = {"model": "vdiff-tiny", "messages": [{"role": "user", "content": "1 + 1"}]}
JOB = {"endpoint": "/v1/chat/completions", "body": CHAT}
ORIGIN = "https://app.example"
# What tells a client how the server is built, and not what is wrong.
INTERNALS = re.compile(
    r"Input should be|pydantic|Traceback|NoneType|<class|object at 0x|\bstr object\b|'(str|int|float|dict|list|bool)'|"
    r"\b\w+\.(py|so)\b|site-packages|sys\.|JSONDecodeError|ValueError|TypeError|KeyError|Expecting (value|property|',')|"
    r"Value error,|valid_type|type=|validation error|asyncpg|sqlalchemy|psycopg|starlette|fastapi|jinja2|unhashable|"
    r"has no attribute|positional argument|\bself\.|__\w+__|regex parse error|decimal literal"
)


@pytest.fixture(scope="module")
def api_and_jobs(
    postgres_url: str,
    redis_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ApiProcess, Jobs]]:
    """An API below a prefix, with CORS and another host name, that knows the bundled model and has
    no worker.
    """
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        register_tiny(jobs)
        log = tmp_path_factory.mktemp("edge") / "api.log"
        api = ApiProcess(
            jobs,
            log,
            root_path="/vdiff",
            cors_origins=ORIGIN,
            allowed_hosts="vdiff.lan,*.inner",
            sync_timeout_seconds=0.2,
            max_wait_seconds=0.2,
            max_body_bytes=100_000,
        )
        stack.callback(api.end)
        yield api.wait_ready(), jobs
        assert '"unhandled"' not in log.read_text()


@pytest.fixture(scope="module")
def client(api_and_jobs: tuple[ApiProcess, Jobs]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=api_and_jobs[0].url, timeout=120) as made:
        yield made


def gets() -> list[str]:
    """The path of every GET route, from the application itself."""
    app = create_app(load_settings({}, database_url="postgresql://x/x", redis_url="redis://x"))
    found = {p for p, methods in app.openapi()["paths"].items() if "get" in methods}
    return sorted(found | {"/", "/docs", "/openapi.json", "/dashboard/app.js"})


@pytest.mark.parametrize("template", gets())
def test_head_is_get_without_a_body(client: httpx.Client, template: str) -> None:
    path = template
    if "{" in template:
        job_id = client.post("/v1/jobs", json=JOB).json()["id"]
        path = re.sub(r"\{\w+\}", job_id, template)
    with client.stream("GET", path) as answer:
        wanted, kind = answer.status_code, answer.headers["content-type"]
    head = client.head(path)
    assert (head.status_code, head.headers["content-type"], head.content) == (wanted, kind, b"")
    assert client.get("/health/live").status_code == 200  # the connection is still in step


def test_head_of_what_only_takes_post_is_405(client: httpx.Client) -> None:
    head = client.head("/v1/chat/completions")
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")
    assert client.head("/none").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions/", "/v1/jobs/", "/v1/models/", "/docs/", "/health/", "/dashboard"],
)
def test_a_slash_at_the_end_redirects_nowhere(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST"):
        answer = client.request(method, path, headers={"host": "127.0.0.1"}, follow_redirects=False)
        assert answer.status_code in (404, 405), answer.headers
        assert "location" not in answer.headers
    assert path.rstrip("/") in answer.text


@pytest.mark.parametrize("base", ["", "/vdiff"])
def test_a_prefix_is_in_every_url_whether_the_proxy_strips_it_or_not(
    client: httpx.Client, base: str
) -> None:
    made = client.post(f"{base}/v1/jobs", json=JOB)
    assert (made.status_code, made.headers["location"]) == (
        202,
        f"/vdiff/v1/jobs/{made.json()['id']}",
    )
    for url in made.json()["urls"].values():
        assert url.startswith("/vdiff/v1/jobs/")
    assert client.get(made.headers["location"]).json()["id"] == made.json()["id"]
    late = client.post(f"{base}/v1/chat/completions", json=CHAT)
    assert (late.status_code, client.get(late.headers["location"]).status_code) == (504, 200)
    hook = client.post(f"{base}/v1/webhook_endpoints", json={"url": "https://example.com/x"})
    assert client.get(hook.headers["location"]).status_code == 200
    key = client.post(f"{base}/v1/keys", json={"name": "x"})
    assert client.get(key.headers["location"]).status_code == 200
    assert client.get(f"{base}/openapi.json").json()["servers"] == [{"url": "/vdiff"}]
    near = client.get(f"{base}/v1/jobz")
    assert "did you mean /v1/jobs" in near.json()["detail"]
    assert client.put(f"{base}/v1/jobs").headers["allow"] == "GET, POST"
    upload = client.post(
        f"{base}/v1/files", files={"file": ("a.jsonl", b"x" * 200_000)}, data={"purpose": "batch"}
    )
    assert upload.status_code == 200  # the files' own limit counts


def test_pages_below_a_prefix_find_their_files(client: httpx.Client) -> None:
    bare = client.get("/vdiff", follow_redirects=False)
    assert (bare.status_code, bare.headers["location"]) == (308, "/vdiff/")
    for page in ("/vdiff/", "/vdiff/docs"):
        links = re.findall(r'(?:src|href)="([^"]+)"', client.get(page).text)
        assert len(links) > 2
        for link in links:
            answer = client.get(str(httpx.URL(page).join(link)))
            assert answer.status_code == 200, link


def test_the_openai_client_below_a_prefix(client: httpx.Client) -> None:
    with openai.OpenAI(
        base_url=f"{client.base_url}/vdiff/v1", api_key="none", max_retries=0
    ) as sdk:
        assert [model.id for model in sdk.models.list()] == ["vdiff-tiny"]
        with pytest.raises(openai.APIStatusError) as late:
            sdk.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert late.value.response.status_code == 504
    assert late.value.response.headers["location"].startswith("/vdiff/v1/jobs/")


def test_cors(client: httpx.Client) -> None:
    ask = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-y",
    }
    asked = client.options("/v1/jobs", headers=ask)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in asked.headers["access-control-allow-headers"]
    answer = client.post(
        "/v1/jobs", json=JOB, headers={"origin": ORIGIN, "sec-fetch-site": "cross-site"}
    )
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (202, ORIGIN)
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert set(exposed) == {name.lower() for name in EXPOSED}
    wrong = client.post("/v1/jobs", json={}, headers={"origin": ORIGIN})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, ORIGIN)
    other = client.post("/v1/jobs", json=JOB, headers={"origin": "https://evil.example"})
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (403, False)
    ask["origin"] = "https://evil.example"
    assert "access-control-allow-origin" not in client.options("/v1/jobs", headers=ask).headers


def test_no_other_origin_is_let_in_by_default(workerless: ApiProcess) -> None:
    headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
    answer = httpx.options(f"{workerless.url}/v1/jobs", headers=headers, timeout=120)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("vdiff.lan", 200),
        ("vdiff.lan:8000", 200),
        ("VDIFF.lan", 200),
        ("a.inner", 200),
        ("inner", 403),
        ("evil.example", 403),
        ("vdiff.lan.evil.example", 403),
        ("xinner", 403),
    ],
)
def test_host_names(client: httpx.Client, host: str, status: int) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_the_page_of_the_api_asks_no_other_host(client: httpx.Client) -> None:
    page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "default-src 'none'" in policy and "http" not in policy
    assert not re.search(r"https?://|//[a-z]", page.text), page.text
    assert "<script>" not in page.text and "onload" not in page.text
    assert client.get("/redoc").status_code == 404
    for name in ("docs.html", "docs.js", "index.html"):
        assert not re.search(r"https?://", (STATIC / name).read_text()), name
    style = (STATIC / "vendor/swagger-ui/swagger-ui.css").read_text()
    assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style)
    for line in (STATIC / "vendor/swagger-ui/VERSION").read_text().splitlines()[1:]:
        digest, name = line.split()
        assert hashed(STATIC / "vendor/swagger-ui" / name) == digest


def hashed(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "\u20ac",
    [],
    [None],
    {},
    {"x": 1},
    [[]],
    [{}],
)


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    body = (
        document["paths"][path]["post"]
        .get("requestBody", {})
        .get("content", {})
        .get("application/json", {})
    )
    return list(body.get("schema", {}).get("properties", {}))


def errors(client: httpx.Client) -> Iterator[tuple[str, httpx.Response]]:
    """Answers of every route to what is wrong in many ways."""
    document = client.get("/openapi.json").json()
    job_id = client.post("/v1/jobs", json=JOB).json()["id"]
    json_type = {"content-type": "application/json"}
    for template, operations in document["paths"].items():
        path = re.sub(r"\{\w+\}", "x", template)
        if template.endswith("/events"):
            path = re.sub(r"\{\w+\}", "none", template) if "{" in template else f"{path}?x=1"
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "query":
                    for value in ("", "x", "-1", "9" * 5000, "\x00", "1e400"):
                        yield (
                            f"{method} {path}?{parameter['name']}={value[:9]!r}",
                            client.request(method, path, params={parameter["name"]: value}),
                        )
            if method == "post":
                for raw in (
                    b"",
                    b"{",
                    b"[1,]",
                    b'{"a" 1}',
                    b"\xff",
                    b"nul",
                    b"NaN",
                    b"9" * 5000,
                    b'"\\ud800"',
                    b"[" * 500,
                ):
                    yield f"{path} {raw[:9]!r}", client.post(path, content=raw, headers=json_type)
                for value in WRONG:
                    yield f"{path} {value!r}", client.post(path, json=value)
                for name in fields_of(document, template):
                    for value in WRONG:
                        yield f"{path} {name}={value!r}", client.post(path, json={name: value})
            else:
                yield (
                    f"{method} {path}",
                    client.request(method, path.replace("x", job_id) if "{" in template else path),
                )
    generation = (
        "max_tokens",
        "temperature",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
        "response_format",
        "diffusion",
        "messages",
        "chat_template_kwargs",
        "stream_options",
        "metadata",
        "tools",
        "n",
    )
    for name in generation:
        for value in WRONG:
            yield (
                f"chat {name}={value!r}",
                client.post("/v1/chat/completions", json={**CHAT, name: value}),
            )
    for schema in (
        {"pattern": "("},
        {"type": "string", "pattern": "a{99999999999}"},
        {"type": 5},
        {"$ref": "#/x"},
        {"type": "object", "required": 5},
        {"enum": []},
        {"multipleOf": 0},
        {"minLength": 2**40},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield (
            f"schema {schema}",
            client.post("/v1/chat/completions", json={**CHAT, "response_format": form}),
        )
    for content in (
        b"",
        b"--x",
        b"--b\r\n\r\n",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
    ):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        yield f"form {content!r}", client.post("/v1/files", content=content, headers=headers)
    grader = {
        "dataset": {"bundled": "vdiff-tiny", "limit": 1},
        "template": "{{input}}",
        "configurations": [{"name": "a", "model": "vdiff-tiny"}],
    }
    for pattern in ("(", "[", "*", "(?P<a>x)(?P<a>y)", "\\"):
        body = {**grader, "graders": [{"type": "regex", "pattern": pattern}]}
        yield f"pattern {pattern}", client.post("/v1/evaluations", json=body)


def test_no_error_tells_how_the_server_is_built(client: httpx.Client) -> None:
    failures, count = [], 0
    for what, answer in errors(client):
        if answer.status_code < 400:
            continue
        count += 1
        body = answer.json()
        body.pop("available", None)
        text = json.dumps(body, ensure_ascii=False)
        found = INTERNALS.search(text)
        if found or answer.status_code == 500:
            failures.append(
                f"{what}: {answer.status_code} {found and found.group()!r} in {text[:300]}"
            )
    assert count > 1000
    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:25])
