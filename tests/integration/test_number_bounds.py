"""Numbers without end: whatever number stands anywhere in a request, the answer is no 500 and
nothing large is built.

The places come from the code: every leaf of a valid body of each route, every field that a body may
have besides, and every query parameter of the OpenAPI document. A new field is covered when its
list of fields names it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.openai import batches
from api.routes import jobs as job_routes
from api.routes import tokenizer
from shared.diffusion_params import DIFFUSION_FIELDS
from shared.evaluations import requests as evaluations
from shared.jobs import deadlines, echo, infill, no_ops, response_requests, scoring
from shared.jobs.fields import LABELS
from shared.keys import requests as keys
from shared.sampling_params import GENERATION_FIELDS
from shared.webhooks.requests import ENDPOINT_FIELDS, JOB_FIELDS
from tests.integration.conftest import ApiProcess

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

HUGE = 10**400
BEYOND = (2**63, HUGE, "1e400")  # no integer field takes these
NUMBERS = (2**31, 2**62, -1, *BEYOND)
MEMORY_MB = 150  # what all requests of a test together may add to the process's peak
ENDLESS = ("/v1/overview/events", "/v1/deliveries/events")
M = "vdiff-tiny"
TEXT = {"model": M, "messages": [{"role": "user", "content": "1 + 1"}]}
GENERATION = {
    "max_tokens": 8,
    "n": 1,
    "seed": 1,
    "top_k": 5,
    "top_p": 0.5,
    "temperature": 0.5,
    "stop_token_ids": [5],
    "logit_bias": {"7": 1},
    "diffusion": {"algorithm": "low_confidence", "steps": 8, "block_length": 8, "max_forwards": 9},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 5},
            "minItems": 1,
            "maxItems": 2,
        },
        "b": {"type": "string", "minLength": 1, "maxLength": 4},
        "c": {"enum": [1, 2]},
        "d": {"const": 3},
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
CHAT = {**TEXT, **GENERATION, "logprobs": True, "top_logprobs": 2}
JOB = {
    "endpoint": "/v1/chat/completions",
    "body": TEXT,
    "deadlines": {"max_run_seconds": 5, "retain_for": 60},
}
DATASET = {"bundled": M, "limit": 1}
GRADERS = [
    {"type": "number", "tolerance": 0.5, "relative": 0.5},
    {"type": "regex", "pattern": "(a)", "group": 1},
]
EVALUATION = {
    "dataset": DATASET,
    "template": "{{input}}",
    "graders": GRADERS,
    "configurations": [
        {
            "name": "a",
            "model": M,
            "repeats": 1,
            "seed": 1,
            "max_tokens": 8,
            "diffusion": {"steps": 8},
        }
    ],
}
KEY = {
    "name": "k",
    "requests_per_minute": 5,
    "max_queued_jobs": 5,
    "max_queued_tokens": 5,
    "weight": 1,
    "expires_at": 4e9,
}
# The route, a valid body, and the names that a body may have at its top and inside `diffusion`.
BODIES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("/v1/chat/completions", CHAT, (*GENERATION_FIELDS, *LABELS, *sorted(no_ops.NAMES))),
    ("/v1/chat/completions", {**TEXT, "response_format": FORMAT}, ()),
    (
        "/v1/completions",
        {"model": M, "prompt": [5, 6], **GENERATION, "logprobs": 2},
        (*GENERATION_FIELDS, *LABELS, *sorted(no_ops.NAMES)),
    ),
    (
        "/v1/completions",
        {"model": M, "prompt": [[5, 6], [7]], "echo": True, "max_tokens": 0, "logprobs": 1},
        echo.FIELDS,
    ),
    (
        "/v1/responses",
        {"model": M, "input": "1 + 1", "max_output_tokens": 8, "top_logprobs": 1},
        response_requests.FIELDS,
    ),
    ("/v1/infill", {"model": M, "parts": ["a", {"hole": 2}]}, infill.FIELDS),
    (
        "/v1/loglikelihood",
        {"model": M, "context": [5], "continuation": [6], "mc_num": 2, "seed": 1},
        scoring.FIELDS,
    ),
    (
        "/v1/loglikelihood",
        {"model": M, "pairs": [{"context": [5], "continuation": [6]}], "cfg_scale": 1},
        (),
    ),
    ("/v1/jobs", JOB, (*job_routes.FIELDS, *deadlines.FIELDS)),
    ("/v1/jobs", {"endpoint": "/v1/infill", "body": {"model": M, "parts": [{"hole": 2}]}}, ()),
    (
        "/v1/jobs/estimate",
        {**JOB, "deadlines": {"start_by": 4e9, "complete_by": 4e9}},
        job_routes.FIELDS,
    ),
    ("/tokenize", {"model": M, "prompt": "a"}, tokenizer.TOKENIZE_FIELDS),
    ("/detokenize", {"model": M, "tokens": [5, 6]}, ()),
    (
        "/v1/batches",
        {
            "input_file_id": "file_x",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        },
        batches.FIELDS,
    ),
    ("/v1/evaluations", EVALUATION, (*evaluations.FIELDS, *evaluations.DATASET_FIELDS)),
    (
        "/v1/evaluations",
        {
            **EVALUATION,
            "graders": [
                {
                    "type": "code",
                    "source": "def grade(o, r, row): return 1.0",
                    "timeout_seconds": 1,
                    "memory_mb": 64,
                    "pass_at": 1,
                }
            ],
        },
        (),
    ),
    ("/v1/evaluations/compare", {"first": "a", "second": "b", "seed": 1, "resamples": 100}, ()),
    ("/v1/keys", KEY, keys.FIELDS),
    ("/v1/webhook_endpoints", {"url": "http://127.0.0.1:9/x"}, (*ENDPOINT_FIELDS, *JOB_FIELDS)),
    ("/v1/webhook_endpoints/ENDPOINT/rotate_secret", {"grace_seconds": 5}, ()),
    ("/v1/webhook_endpoints/ENDPOINT/redeliver", {"since": 5, "until": 6}, ()),
    ("/v1/webhook_secret/rotate", {"grace_seconds": 5}, ()),
    ("/v1/keys/KEY/rotate", {"grace_seconds": 5}, ()),
    ("/v1/jobs/JOB/retry", {"deadlines": {"max_run_seconds": 5}}, ()),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a body, outer ones too."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, item in inner:
        yield (*at, name)
        yield from places(item, (*at, name))


def put(body: Any, at: tuple[Any, ...], number: Any) -> bytes:
    """The body with the number at a place; as text, because 1e400 is no Python number."""
    made = copy.deepcopy(body)
    item = made
    for name in at[:-1]:
        item = item[name]
    item[at[-1]] = "NUMBER" if number == "1e400" else number
    text = json.dumps(made) if number != HUGE else json.dumps({**made})
    return text.replace('"NUMBER"', "1e400").encode()


def get(body: Any, at: tuple[Any, ...]) -> Any:
    for name in at:
        body = body[name]
    return body


def peak_mb(api: ApiProcess) -> int:
    status = Path(f"/proc/{api.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024  # type: ignore[index]


@pytest.fixture(scope="module")
def client(workerless: ApiProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=workerless.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def ids(client: httpx.Client) -> dict[str, str]:
    return {
        "JOB": client.post("/v1/jobs", json=JOB).json()["id"],
        "ENDPOINT": client.post(
            "/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/x"}
        ).json()["id"],
        "KEY": client.post("/v1/keys", json={"name": "x"}).json()["id"],
    }


def wrong_with(answer: httpx.Response, what: str) -> list[str]:
    """Return what is wrong with an answer to a hostile number; empty if nothing is."""
    if answer.status_code >= 500 and answer.status_code != 504:
        return [f"{what}: {answer.status_code} {answer.text[:300]}"]
    if answer.status_code == 400:
        error = answer.json()["error"]
        if not error["param"] or len(error["message"]) > 1500:
            return [f"{what}: {error}"]
    return []


@pytest.mark.parametrize(
    ("path", "body", "fields"), BODIES, ids=[f"{path} {i}" for i, (path, *_) in enumerate(BODIES)]
)
def test_any_number_in_any_field(
    workerless: ApiProcess,
    client: httpx.Client,
    ids: dict[str, str],
    path: str,
    body: dict[str, Any],
    fields: tuple[str, ...],
) -> None:
    for name, known in ids.items():
        path = path.replace(name, known)
    everywhere = {**dict.fromkeys((at,) for at in fields), **dict.fromkeys(places(body))}
    if "diffusion" in fields:
        everywhere |= dict.fromkeys(("diffusion", name) for name in DIFFUSION_FIELDS)
    before, failures, integers = peak_mb(workerless), [], 0
    for at in everywhere:
        whole = body if at[0] in body or len(at) == 1 else {**body, at[0]: {}}
        try:
            valid = get(body, at)
        except (KeyError, TypeError):
            valid = None
        integer = isinstance(valid, int) and not isinstance(valid, bool)
        integers += integer
        for number in NUMBERS:
            what = f"{path} {at} = {str(number)[:25]}"
            answer = client.post(
                path, content=put(whole, at, number), headers={"content-type": "application/json"}
            )
            failures += wrong_with(answer, what)
            if integer and number in BEYOND:
                param = answer.json().get("error", {}).get("param") or ""
                named = number == "1e400" or any(
                    str(name) in param for name in at if isinstance(name, str)
                )
                if answer.status_code != 400 or not named:
                    failures.append(
                        f"{what} is not refused by its name: {answer.status_code} {answer.text[:300]}"
                    )
    assert not failures, "\n".join(failures[:20])
    assert peak_mb(workerless) - before < MEMORY_MB
    assert workerless.process.poll() is None


SPELLED = (
    "2147483648",
    str(2**62),
    str(2**63),
    "-1",
    "1e400",
    "9" * 400,
    "nan",
    "0x10",
    "\u0663",
    "1" + "0" * 5000,
)


def test_any_number_in_any_query(
    workerless: ApiProcess, client: httpx.Client, ids: dict[str, str]
) -> None:
    document = client.get("/openapi.json").json()
    before, failures, seen = peak_mb(workerless), [], set()
    for template, operations in document["paths"].items():
        path = (
            template.replace("{job_id}", ids["JOB"])
            .replace("{endpoint_id}", ids["ENDPOINT"])
            .replace("{", "")
            .replace("}", "")
        )
        named = [
            p["name"] for p in operations.get("get", {}).get("parameters", []) if p["in"] == "query"
        ]
        if template in ENDLESS or (template.endswith("/events") and not named):
            continue
        for name in (*named, *(("metadata[a]",) if template == "/v1/jobs" else ())):
            seen.add(name)
            for value in SPELLED:
                answer = client.get(path, params={name: value})
                failures += wrong_with(answer, f"GET {path}?{name}={value[:25]}")
                if name in ("limit", "wait", "starting_after") and answer.status_code not in (
                    400,
                    404,
                ):
                    failures.append(f"GET {path}?{name}={value[:25]} is {answer.status_code}")
    assert {"limit", "wait", "cursor", "after", "created_after", "starting_after"} <= seen
    assert not failures, "\n".join(failures[:20])
    assert peak_mb(workerless) - before < MEMORY_MB


HEADERS = (
    "prefer",
    "last-event-id",
    "x-stainless-retry-count",
    "idempotency-key",
    "if-none-match",
    "traceparent",
    "range",
    "x-request-id",
)


def test_any_number_in_any_header(
    workerless: ApiProcess, client: httpx.Client, ids: dict[str, str]
) -> None:
    failures = []
    for header in HEADERS:
        for number in SPELLED:
            if not number.isascii():
                continue
            for value in (number, f"wait={number}", f"{number}-{number}", f"bytes={number}-"):
                what = f"{header}: {value[:30]}"
                sent = {header: value}
                with client.stream("GET", f"/v1/jobs/{ids['JOB']}/events", headers=sent) as stream:
                    status, kind = stream.status_code, stream.headers["content-type"]
                if status != 200 and not (status == 400 and kind.startswith("application/problem")):
                    failures.append(f"events {what}: {status}")
                answer = client.post("/v1/jobs", json=JOB, headers=sent)
                failures += wrong_with(answer, what)
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize(
    "template",
    ["/v1/jobs/{}", "/v1/files/{}", "/v1/batches/{}", "/v1/deliveries/{}/redeliver", "/v1/keys/{}"],
)
def test_any_number_as_an_id(client: httpx.Client, template: str) -> None:
    for value in SPELLED:
        method = "POST" if template.endswith("redeliver") else "GET"
        answer = client.request(method, template.format(value))
        assert answer.status_code == 404, (template, value, answer.text[:300])


@pytest.mark.parametrize("seconds", SPELLED)
def test_any_number_in_a_form(client: httpx.Client, seconds: str) -> None:
    form = {
        "purpose": "batch",
        "expires_after[anchor]": "created_at",
        "expires_after[seconds]": seconds,
    }
    answer = client.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data=form)
    assert answer.status_code == 400
    assert "seconds" in answer.json()["error"]["param"]
