"""Bad input: each is a 4xx that names the field, never a 500, never accepted; and the engine's
other requests go on.
"""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from shared.settings import Settings
from tests.integration.conftest import Served

pytestmark = pytest.mark.integration

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = {"model": "vdiff-tiny", "prompt": "What is 1 + 1?", "max_tokens": 16}
MESSAGES = {
    "model": "vdiff-tiny",
    "messages": [{"role": "user", "content": "What is 1 + 1?"}],
    "max_tokens": 16,
}
NAN = float("nan")

BODIES: list[tuple[dict[str, Any], str]] = [
    ({"colour": 1}, "colour"),
    ({"diffusion": {"colour": 1}}, "diffusion.colour"),
    ({"diffusion": []}, "diffusion"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 513}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": list("abcdefghijklmnopq")}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids[0]"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"logprobs": 21}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 5}}, "logit_bias.x"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"diffusion": {"algorithm": "magic"}}, "diffusion.algorithm"),
    ({"diffusion": {"algorithm": "threshold", "threshold": 0}}, "diffusion.threshold"),
    ({"diffusion": {"algorithm": "threshold", "threshold": 1.01}}, "diffusion.threshold"),
    ({"diffusion": {"algorithm": "threshold", "threshold": "x"}}, "diffusion.threshold"),
    ({"diffusion": {"threshold": 0.9}}, "diffusion.threshold"),
    ({"diffusion": {"algorithm": "factor", "factor": 0}}, "diffusion.factor"),
    ({"diffusion": {"block_length": 5}}, "diffusion.block_length"),
    ({"diffusion": {"block_length": 32}}, "diffusion.block_length"),
    ({"diffusion": {"block_length": 8, "steps": 3}}, "diffusion.steps"),
    ({"diffusion": {"steps": 0}}, "diffusion.steps"),
    ({"diffusion": {"cache": "exact"}}, "diffusion.cache"),
    ({"diffusion": {"cfg_scale": -1}}, "diffusion.cfg_scale"),
    ({"diffusion": {"suppress_end": "never"}}, "diffusion.suppress_end"),
    ({"diffusion": {"suppress_token_ids": [1]}}, "diffusion.suppress_token_ids"),
    ({"diffusion": {"visualize": 1}}, "diffusion.visualize"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
]
PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt"),
    (None, "prompt"),
    (5, "prompt"),
    ([], "prompt"),
    (["a", ""], "prompt[1]"),
    ([1, "a"], "prompt"),
    ([10**9], "prompt"),
    ([-1], "prompt"),
    ("seven " * 600, "prompt"),
    ({}, "prompt"),
    ([[1], [-2]], "prompt[1]"),
    (["a"] * 129, "prompt"),
]
MESSAGE_LISTS: list[tuple[Any, str]] = [
    ([], "messages"),
    (None, "messages"),
    ("hi", "messages"),
    ([5], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "king", "content": "x"}], "messages[0].role"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ([{"role": "user", "content": "seven " * 600}], "messages"),
]


def refused(served: Served, path: str, body: Any, param: str, status: int = 400) -> None:
    answer = served.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert param.split("[")[0].split(".")[-1] in error["message"] or status == 404


@pytest.mark.parametrize(("wrong", "param"), BODIES, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_named(served: Served, wrong: dict[str, Any], param: str) -> None:
    refused(served, CHAT, {**MESSAGES, **wrong}, param)
    refused(served, COMPLETIONS, {**PROMPT, **wrong}, param)
    job = {
        "endpoint": CHAT,
        "body": {**MESSAGES, **{k: v for k, v in wrong.items() if k != "stream"}},
    }
    if "stream" not in wrong:
        refused(served, "/v1/jobs", job, param)


@pytest.mark.parametrize(("prompt", "param"), PROMPTS, ids=lambda value: str(value)[:40])
def test_a_bad_prompt_is_named(served: Served, prompt: Any, param: str) -> None:
    refused(served, COMPLETIONS, {**PROMPT, "prompt": prompt}, param)
    refused(
        served, "/v1/jobs", {"endpoint": COMPLETIONS, "body": {**PROMPT, "prompt": prompt}}, param
    )


@pytest.mark.parametrize(("messages", "param"), MESSAGE_LISTS, ids=lambda value: str(value)[:40])
def test_bad_messages_are_named(served: Served, messages: Any, param: str) -> None:
    refused(served, CHAT, {**MESSAGES, "messages": messages}, param)
    refused(
        served, "/v1/jobs", {"endpoint": CHAT, "body": {**MESSAGES, "messages": messages}}, param
    )


@pytest.mark.parametrize(
    ("job", "param"),
    [
        ([], "body"),
        ({}, "endpoint"),
        ({"endpoint": CHAT}, "body"),
        ({"endpoint": "/v1/none", "body": {}}, "endpoint"),
        ({"endpoint": 5, "body": {}}, "endpoint"),
        ({"endpoint": [CHAT], "body": {}}, "endpoint"),
        ({"endpoint": CHAT, "body": 5}, "body"),
        ({"endpoint": CHAT, "body": MESSAGES, "webhook": {"url": "http://x"}}, "webhook.url"),
        ({"endpoint": CHAT, "body": MESSAGES, "webhook": {"events": []}}, "webhook.url"),
        ({"endpoint": CHAT, "body": MESSAGES, "priority": "urgent"}, "priority"),
        ({"endpoint": CHAT, "body": MESSAGES, "priority": []}, "priority"),
        ({"endpoint": CHAT, "body": MESSAGES, "custom_id": ""}, "custom_id"),
        (
            {"endpoint": CHAT, "body": MESSAGES, "metadata": {str(i): "x" for i in range(17)}},
            "metadata",
        ),
        ({"endpoint": CHAT, "body": {**MESSAGES, "stream": True}}, "stream"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_job_is_named(served: Served, job: Any, param: str) -> None:
    refused(served, "/v1/jobs", job, param)


def test_unknown_things_are_404(served: Served) -> None:
    refused(served, CHAT, {**MESSAGES, "model": "none"}, "model", 404)
    refused(served, COMPLETIONS, {**PROMPT, "model": "none", "stream": True}, "model", 404)
    refused(
        served, "/v1/jobs", {"endpoint": CHAT, "body": {**MESSAGES, "model": "none"}}, "model", 404
    )
    for path in (
        "/v1/jobs/none",
        "/v1/jobs/job_01arz3ndektsv4rrffq69g5fav",
        "/v1/jobs/%00",
        "/v1/jobs/none/events",
    ):
        answer = served.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), path
    assert served.client.post("/v1/jobs/none/cancel").status_code == 404
    for wait in ("x", "-1", "1e9", "nan"):
        answer = served.client.get("/v1/jobs/none", params={"wait": wait})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wait")


@pytest.mark.parametrize(
    ("raw", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", "body"),
        (b"{", 400, "invalid_json", "body"),
        (b"\xff\xfe", 400, "invalid_utf8", "body"),
        (b'{"model": NaN}', 400, "invalid_json", "body"),
        (b'{"model": 1e999}', 400, "invalid_json", "body"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "invalid_json", "body"),
        (b"[" * 100_000, 400, "invalid_json", "body"),
        (b"[" * 100_000 + b"]" * 100_000, 400, "invalid_json", "body"),
        (b'{"model": "vdiff-tiny", "prompt": "a\\u0000b"}', 400, "invalid_characters", "prompt"),
        (b'{"model": "vdiff-tiny", "prompt": "a\\ud800b"}', 400, "invalid_characters", "prompt"),
        (
            b'{"model": "vdiff-tiny", "prompt": "x", "\\u0000": 1}',
            400,
            "invalid_characters",
            "body",
        ),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/jobs"])
def test_a_body_that_is_no_json(
    served: Served, path: str, raw: bytes, status: int, code: str, param: str
) -> None:
    answer = served.client.post(path, content=raw, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def test_a_body_of_another_kind(served: Served) -> None:
    answer = served.client.post(
        CHAT, content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/jobs"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_20_mb(served: Served, chunked: bool, path: str) -> None:
    body = json.dumps({**PROMPT, "prompt": "x" * 20_000_000}).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    try:
        answer = served.client.post(
            path, content=pieces if chunked else body, headers={"content-type": "application/json"}
        )
    except (
        Exception
    ) as exc:  # the server may close while we still send; ask again over a raw connection
        connection = http.client.HTTPConnection("127.0.0.1", served.api.port, timeout=120)
        connection.putrequest("POST", path)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        raw = connection.getresponse()
        assert raw.status == 413, exc
        assert json.loads(raw.read())["error"]["param"] == "body"
        return
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "body")


def test_the_default_limit_is_below_20_mb() -> None:
    assert Settings.model_fields["max_body_bytes"].default < 20_000_000


def test_a_stream_that_cannot_begin_is_an_ordinary_error(served: Served) -> None:
    for path, body in ((CHAT, MESSAGES), (COMPLETIONS, PROMPT)):
        answer = served.client.post(path, json={**body, "stream": True, "max_tokens": 0})
        assert (answer.status_code, answer.headers["content-type"]) == (
            400,
            "application/problem+json",
        )
        assert answer.json()["error"]["param"] == "max_tokens"
        assert "x-job-id" not in answer.headers


def test_a_bad_field_has_the_clients_own_name(served: Served) -> None:
    body = {k: v for k, v in MESSAGES.items() if k != "max_tokens"}
    for bad in (0, 513, "16"):
        refused(served, CHAT, {**body, "max_completion_tokens": bad}, "max_completion_tokens")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/none?wiat=30"),
        ("GET", "/v1/jobs/none/result?wiat=1"),
        ("POST", "/v1/jobs?wiat=1"),
        ("POST", f"{CHAT}?wiat=1"),
        ("GET", "/v1/models?wiat=1"),
        ("GET", "/v1/jobs?wiat=1"),
        ("GET", "/v1/jobs/none?metadata[a]=1&wiat=1"),
    ],
)
def test_an_unknown_query_parameter_is_named(served: Served, method: str, path: str) -> None:
    answer = served.client.request(method, path, json=None if method == "GET" else MESSAGES)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter"), (
        answer.text
    )
    assert answer.json()["error"]["param"] in ("wiat", "metadata[a]")
    assert served.client.get("/health/live?probe=1").status_code == 200


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/jobs?limit=1&limit=2", "limit"),
        ("/v1/jobs?metadata[a]=b&metadata[a]=c", "metadata[a]"),
        ("/v1/jobs/none?wait=1&wait=2", "wait"),
        ("/v1/files?after=a&after=b", "after"),
    ],
)
def test_a_query_parameter_that_is_given_twice_is_named(
    served: Served, path: str, param: str
) -> None:
    answer = served.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter"), (
        answer.text
    )
    assert answer.json()["error"]["param"] == param


def test_others_do_not_notice(served: Served) -> None:
    """A long job runs while a storm of bad requests comes in, and ends as if nothing had been."""
    body = {**MESSAGES, "max_tokens": 256, "ignore_eos": True, "temperature": 0}
    quiet = served.client.post(
        "/v1/jobs", json={"endpoint": CHAT, "body": body}, headers={"prefer": "wait=60"}
    ).json()
    job = served.client.post("/v1/jobs", json={"endpoint": CHAT, "body": body}).json()
    for wrong, _ in BODIES:
        assert 400 <= served.client.post(CHAT, json={**MESSAGES, **wrong}).status_code < 500
    loud = served.client.get(job["urls"]["self"], params={"wait": 60}).json()
    assert (loud["status"], loud["attempts"]) == ("succeeded", 1)
    assert loud["result"]["choices"] == quiet["result"]["choices"]
