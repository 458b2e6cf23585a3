"""Sending by the client: the key that keeps a retry from being paid twice, when it tries again, and
the texts of errors.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

import vdiff
from shared.errors import ConfigurationError
from shared.webhooks.events import signed_headers
from shared.webhooks.secrets import new_secret
from vdiff import client as module
from vdiff.client import AsyncClient, Client, calls

Handler = Callable[[httpx.Request], httpx.Response]

JOB = {
    "id": "job_1",
    "object": "job",
    "status": "queued",
    "done": False,
    "model": "m",
    "error": None,
    "result": None,
}
DONE = {
    **JOB,
    "status": "succeeded",
    "done": True,
    "result": {"choices": [{"message": {"content": "42"}}]},
}
FAILED = {
    **JOB,
    "status": "failed",
    "done": True,
    "error": {"code": "not_finite", "message": "NaN", "param": None},
}


def problem(status: int, code: str, param: str | None = None, **headers: str) -> httpx.Response:
    error = {"message": f"said {code}", "type": "x", "param": param, "code": code}
    return httpx.Response(status, json={"status": status, "error": error}, headers=headers)


class Server:
    """Answers with what it was given, in order, the last again and again; keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception | Handler) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.requests.append(request)
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.requests]


def client_of(server: Handler, **options: Any) -> Client:
    return Client("http://test", model="m", transport=httpx.MockTransport(server), **options)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Return how long the client waited; the test itself does not wait."""
    waited: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock[0] += seconds

    async def sleep_async(seconds: float) -> None:
        sleep(seconds)

    for name in ("sync_client", "async_client"):
        monkeypatch.setattr(f"vdiff.client.{name}.monotonic", lambda: clock[0])
    monkeypatch.setattr("vdiff.client.sync_client.sleep", sleep)
    monkeypatch.setattr("vdiff.client.async_client.sleep", sleep_async)
    yield waited


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ReadError("connection reset"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
        httpx.Response(502, text="<html>bad gateway</html>"),
        problem(503, "overloaded"),
        problem(500, "internal_error"),
        problem(429, "rate_limit_exceeded"),
        problem(409, "conflict"),
    ],
)
def test_a_submission_is_sent_again_under_the_same_key(trouble: httpx.Response | Exception) -> None:
    server = Server(trouble, trouble, httpx.Response(202, json=JOB))
    with client_of(server) as client:
        assert client.submit("hi").id == "job_1"
        assert len(server.requests) == 3
        assert len({r.content for r in server.requests}) == 1
        (key,) = set(server.keys())
        assert key
        client.submit("hi")
        assert server.keys()[-1] not in (None, key)  # another call is another job


def test_a_key_of_ones_own() -> None:
    server = Server(httpx.Response(202, json=JOB))
    with client_of(server) as client:
        client.submit("hi", idempotency_key="mine")
    assert server.keys() == ["mine"]


def test_what_cannot_be_repeated_is_not() -> None:
    server = Server(httpx.ReadError("reset"), httpx.Response(202, json=JOB))
    with (
        client_of(server) as client,
        pytest.raises(module.ServerUnreachable, match="not sent again") as lost,
    ):
        client.retry("job_1")
    assert lost.value.sent and len(server.requests) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        problem(503, "database_unavailable"),
        httpx.Response(503, text="<html>"),
        problem(504, "wait_timeout"),
    ],
)
def test_nor_after_an_answer_that_leaves_it_open(trouble: httpx.Response) -> None:
    """The database may have gone as it committed, and a proxy speaks for nobody."""
    server = Server(trouble, httpx.Response(202, json=JOB))
    with client_of(server) as client, pytest.raises(module.ServerError):
        client.retry("job_1")
    assert len(server.requests) == 1


def test_a_replay_is_sent_again_under_its_key() -> None:
    server = Server(
        httpx.ReadError("reset"),
        problem(503, "database_unavailable"),
        httpx.Response(202, json=JOB),
    )
    with client_of(server) as client:
        assert client.replay("job_1").id == "job_1"
    assert len(server.requests) == 3 and len(set(server.keys())) == 1 and server.keys()[0]


@pytest.mark.parametrize(
    "trouble", [httpx.ConnectError("refused"), problem(503, "overloaded"), problem(429, "x")]
)
def test_unless_nothing_can_have_been_done(trouble: httpx.Response | Exception) -> None:
    server = Server(trouble, httpx.Response(202, json=JOB))
    with client_of(server) as client:
        assert client.retry("job_1").id == "job_1"


def test_retry_after_is_honoured(waits: list[float]) -> None:
    with client_of(
        Server(problem(429, "x", **{"Retry-After": "17"}), httpx.Response(200, json=JOB))
    ) as client:
        client.get("job_1")
    assert waits == [17.0]


def test_who_waits_may_be_told(waits: list[float]) -> None:
    told: list[tuple[float, str]] = []

    def tell(seconds: float, why: str) -> None:
        told.append((seconds, why))

    limited = problem(429, "rate_limit_exceeded", **{"retry-after": "7"})
    server = Server(limited, httpx.ConnectError("no route"), httpx.Response(200, json=JOB))
    with client_of(server, on_wait=tell) as client:
        client.submit("hi")
    assert told[0] == (7.0, "said rate_limit_exceeded") and told[1] == (
        waits[1],
        "http://test: no route",
    )


def test_retry_after_beyond_our_patience_is_an_error_at_once(waits: list[float]) -> None:
    server = Server(problem(429, "rate_limit_exceeded", **{"Retry-After": "100"}))
    with (
        client_of(server, retry_seconds=30) as client,
        pytest.raises(module.RateLimited) as refused,
    ):
        client.get("job_1")
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (
        429,
        "rate_limit_exceeded",
        100.0,
    )
    assert waits == []


def test_patience_ends(waits: list[float]) -> None:
    server = Server(httpx.ConnectError("refused"))
    with (
        client_of(server, retry_seconds=20) as client,
        pytest.raises(module.ServerUnreachable, match="http://test") as no,
    ):
        client.get("job_1")
    assert not no.value.sent and no.value.code == "server_unreachable"
    assert 4 < len(server.requests) < 12 and sum(waits) <= 20
    assert waits == sorted(waits) or max(waits) <= 10  # growing, bounded


def test_a_bug_of_the_server_is_not_asked_for_ever() -> None:
    server = Server(problem(500, "internal_error"))
    with client_of(server) as client, pytest.raises(module.ServerError):
        client.get("job_1")
    assert len(server.requests) == 3


def test_the_server_may_forbid_a_retry() -> None:
    server = Server(problem(503, "overloaded", **{"x-should-retry": "false"}))
    with client_of(server) as client, pytest.raises(module.ServerError):
        client.get("job_1")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, module.BadRequest),
        (401, module.AuthenticationFailed),
        (403, module.PermissionDenied),
        (404, module.NotFound),
        (409, module.Conflict),
        (410, module.Gone),
        (413, module.BadRequest),
        (422, module.BadRequest),
    ],
)
def test_errors_have_status_code_and_param(status: int, kind: type[module.ApiError]) -> None:
    answer = problem(status, "some_code", "diffusion.threshold", **{"X-Request-ID": "r-1"})
    with client_of(Server(answer)) as client, pytest.raises(kind) as wrong:
        client.submit("hi")
    error = wrong.value
    assert (error.status, error.code, error.param, error.request_id) == (
        status,
        "some_code",
        "diffusion.threshold",
        "r-1",
    )
    assert str(error) == "said some_code" and isinstance(error, vdiff.ClientError)


def test_another_server() -> None:
    with client_of(Server(httpx.Response(200, text="<html>hello</html>"))) as client:
        with pytest.raises(module.UnexpectedAnswer, match="<html>"):
            client.get("job_1")
        with pytest.raises(module.UnexpectedAnswer, match="event stream"):
            list(client.stream("job_1"))


def test_a_report_and_a_download_bear_a_lost_connection() -> None:
    server = Server(httpx.ReadError("gone"), httpx.Response(200, text="<html>"))
    with client_of(server) as client:
        assert client.evaluation_report("eval_1") == "<html>"
    server = Server(
        httpx.ReadError("gone"), problem(503, "overloaded"), httpx.Response(200, text="ab")
    )
    with client_of(server) as client:
        assert b"".join(client.download("file_1")) == b"ab"

    def half() -> Iterator[bytes]:
        yield b"a"
        raise httpx.ReadError("cut")

    with client_of(Server(lambda _: httpx.Response(200, content=half()))) as client:
        pieces = client.download("file_1")
        with pytest.raises(module.ServerUnreachable, match="cut off"):
            list(pieces)


@pytest.mark.parametrize("name", ["", "../keys", "a/b", "a?b", "jöb", None, 7])
def test_an_id_stays_an_id(name: Any) -> None:
    with (
        client_of(Server(httpx.Response(200, json=JOB))) as client,
        pytest.raises(module.ClientError, match="no id"),
    ):
        client.get(name)


def sent(client: Client, server: Server, prompt: Any, **options: Any) -> Any:
    client.submit(prompt, **options)
    return json.loads(server.requests[-1].content)


def test_prompts_of_every_kind() -> None:
    server = Server(httpx.Response(202, json=JOB))
    with client_of(server) as client:
        chat = sent(
            client,
            server,
            "hi",
            max_tokens=8,
            priority="bulk",
            metadata={"a": "b"},
            extra_body={"new": 1},
        )
        assert chat == {
            "endpoint": "/v1/chat/completions",
            "priority": "bulk",
            "metadata": {"a": "b"},
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 8,
                "new": 1,
            },
        }
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        assert sent(client, server, messages)["body"]["messages"] == messages
        assert sent(client, server, [1, 2])["endpoint"] == "/v1/completions"
        text = sent(client, server, "hi", endpoint="/v1/completions", model="other")
        assert text["body"] == {"model": "other", "prompt": "hi"}
        whole = sent(client, server, {"prompt": "x", "model": "own"}, seed=3)
        assert whole == {
            "endpoint": "/v1/completions",
            "body": {"prompt": "x", "model": "own", "seed": 3},
        }
        with pytest.raises(module.ClientError, match="endpoint="):
            client.submit({"context": "x"})


def models(*found: tuple[str, int]) -> httpx.Response:
    data = [{"id": name, "object": "model", "workers": workers} for name, workers in found]
    return httpx.Response(200, json={"object": "list", "data": data})


def test_a_line_of_generate_is_a_prompt_too() -> None:
    """`custom_id` is the job's; token ids are a completion's prompt. Both at once are the server's
    to refuse.
    """
    body = calls.job_body({"custom_id": "a", "prompt_token_ids": [5, 6], "seed": 1}, {}, "m")
    assert body == {
        "endpoint": "/v1/completions",
        "body": {"prompt": [5, 6], "seed": 1, "model": "m"},
        "custom_id": "a",
    }
    assert (
        "prompt_token_ids"
        in calls.job_body({"prompt_token_ids": [5], "prompt": "x"}, {}, "m")["body"]
    )
    first, second = calls.batch_lines(
        [{"custom_id": "a", "prompt": "x"}, "y"], model="m"
    ).splitlines()
    assert (json.loads(first)["custom_id"], json.loads(second)["custom_id"]) == ("a", "line-2")


def test_the_only_model_needs_no_name() -> None:
    server = Server(models(("old", 0), ("new", 1)), httpx.Response(202, json=JOB))
    with Client("http://test", transport=httpx.MockTransport(server)) as client:
        assert sent(client, server, "hi")["body"]["model"] == "new"
        client.submit("again")
    assert [r.url.path for r in server.requests] == ["/v1/models", "/v1/jobs", "/v1/jobs"]
    two = httpx.MockTransport(Server(models(("a", 1), ("b", 1))))
    with (
        Client("http://test", transport=two) as client,
        pytest.raises(module.ClientError, match="name a model: a, b"),
    ):
        client.submit("hi")


def test_waiting_asks_again_until_it_is_over() -> None:
    server = Server(
        httpx.Response(200, json=JOB), httpx.ReadTimeout("lost"), httpx.Response(200, json=DONE)
    )
    with client_of(server) as client:
        assert client.wait("job_1").text == "42"
    assert all(r.url.params["wait"] == "30.000" for r in server.requests)


def test_a_server_that_allows_shorter_waits() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if float(request.url.params["wait"]) > 10:
            return problem(400, "invalid_parameter", "wait")
        return httpx.Response(200, json=DONE)

    server = Server(answer)
    with client_of(server) as client:
        assert client.wait("job_1").ok
        assert client.wait("job_1").ok
    assert [r.url.params["wait"] for r in server.requests] == ["30.000", "15.000", "7.500", "7.500"]


def test_waiting_may_have_an_end() -> None:
    with (
        client_of(Server(httpx.Response(200, json=JOB))) as client,
        pytest.raises(TimeoutError, match="it goes on"),
    ):
        client.wait("job_1", timeout=3)


def test_run_raises_what_the_job_says() -> None:
    server = Server(httpx.Response(202, json=JOB), httpx.Response(200, json=FAILED))
    with (
        client_of(server) as client,
        pytest.raises(module.JobFailed, match="job_1 failed: NaN") as failed,
    ):
        client.run("hi")
    assert failed.value.code == "not_finite" and failed.value.job.status == "failed"


def events(*parts: bytes) -> Handler:
    def answer(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            for part in parts:
                if part == b"LOST":
                    raise httpx.ReadError("reset")
                yield part

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())

    return answer


def test_a_stream_goes_on_where_it_was_lost() -> None:
    first = events(
        b": hello\n\nid: 0-0\nevent: queued\ndata: {}\n\nid: 1-0\nev",
        b'ent: progress\ndata: {"text": "4"}\n\n',
        b"LOST",
    )
    second = events(
        b'id: 2-0\r\nevent: progress\r\ndata: {"text": "\xe2\x80\xa8"}\r\n\r\n'
    )  # and the server stops
    third = events(b'id: 2-0\nevent: done\ndata: {"status": "succeeded"}\n\n')
    server = Server(first, httpx.ConnectError("refused"), second, third)
    with client_of(server) as client:
        found = list(client.stream("job_1"))
    assert [(e.id, e.type) for e in found] == [
        ("0-0", "queued"),
        ("1-0", "progress"),
        ("2-0", "progress"),
        ("2-0", "done"),
    ]
    assert found[2].data == {"text": "\u2028"}
    assert [r.headers.get("last-event-id") for r in server.requests] == [None, "1-0", "1-0", "2-0"]


def test_lists_page_as_they_are_read() -> None:
    def page(request: httpx.Request) -> httpx.Response:
        number = int(request.url.params.get("cursor", "0"))
        data = [{**JOB, "id": f"job_{number}{i}"} for i in range(2)]
        return httpx.Response(
            200, json={"data": data, "has_more": number < 2, "next_cursor": str(number + 1)}
        )

    server = Server(page)
    with client_of(server) as client:
        assert len(list(client.list_jobs(status="queued", metadata={"run": "7"}))) == 6
        assert [r.url.params["metadata[run]"] for r in server.requests] == ["7", "7", "7"]
        server.requests.clear()
        assert [job.id for job in client.list_jobs(limit=1)] == ["job_00"] and len(
            server.requests
        ) == 1


def test_address_and_key_come_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDIFF_BASE_URL", "http://example.test:9/v1/")
    monkeypatch.setenv("VDIFF_API_KEY", "sk-1")
    server = Server(httpx.Response(200, json=JOB))
    with Client(transport=httpx.MockTransport(server)) as client:
        client.get("job_1")
        assert client.base_url == "http://example.test:9"
    assert str(server.requests[0].url) == "http://example.test:9/v1/jobs/job_1"
    assert server.requests[0].headers["authorization"] == "Bearer sk-1"
    monkeypatch.setenv("VDIFF_BASE_ULR", "x")
    with pytest.raises(ConfigurationError, match="did you mean VDIFF_BASE_URL"):
        Client()


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "ftp://x"},
        {"base_url": "localhost:8000"},
        {"api_key": "a\nb"},
        {"retry_seconds": -1},
    ],
)
def test_bad_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        Client(**options)
    assert wrong.value.param == next(iter(options))


def test_both_clients_have_the_same_face() -> None:
    def face(kind: type) -> dict[str, list[str]]:
        public = {
            k: v for k, v in vars(kind).items() if not k.startswith("_") and inspect.isfunction(v)
        }
        return {name: list(inspect.signature(method).parameters) for name, method in public.items()}

    assert face(Client) == face(AsyncClient) and len(face(Client)) > 25


async def test_the_async_client_retries_alike() -> None:
    server = Server(
        httpx.ReadError("reset"), httpx.Response(202, json=JOB), httpx.Response(200, json=DONE)
    )
    async with AsyncClient(
        "http://test", model="m", transport=httpx.MockTransport(server)
    ) as client:
        assert (await client.run("hi")).text == "42"
    assert len(set(server.keys()[:2])) == 1


async def test_the_async_stream_goes_on_where_it_was_lost() -> None:
    seen: list[str | None] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("last-event-id"))

        async def body() -> AsyncIterator[bytes]:
            if len(seen) == 1:
                yield b"id: 1-0\nevent: progress\ndata: {}\n\n"
                raise httpx.ReadError("reset")
            yield b"id: 1-0\nevent: done\ndata: {}\n\n"

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())

    async with AsyncClient("http://test", transport=httpx.MockTransport(answer)) as client:
        assert [event.type async for event in client.stream("job_1")] == ["progress", "done"]
    assert seen == [None, "1-0"]


def test_webhooks_are_verified() -> None:
    secret, body = new_secret(), b'{"id": "evt_1", "type": "job.succeeded"}'
    headers = signed_headers("evt_1", body, [new_secret(), secret], now=datetime.now(UTC))
    assert vdiff.verify_webhook(body, headers, secret)["type"] == "job.succeeded"
    assert (
        vdiff.verify_webhook(body, {k.title(): v for k, v in headers.items()}, secret)["id"]
        == "evt_1"
    )
    old = signed_headers("evt_1", body, [secret], now=datetime.now(UTC) - timedelta(minutes=6))
    for bad_body, bad_headers, bad_secret in [
        (body + b" ", headers, secret),
        (body, headers, new_secret()),
        (body, old, secret),
        (body, {}, secret),
        (body, {**headers, "webhook-signature": "garbage"}, secret),
        (body, {**headers, "webhook-signature": "v1,!!!"}, secret),
        (b"\xff", headers, secret),
    ]:
        with pytest.raises(module.InvalidWebhook):
            vdiff.verify_webhook(bad_body, bad_headers, bad_secret)
    with pytest.raises(module.ClientError, match="whsec_"):
        vdiff.verify_webhook(body, headers, "")
    with client_of(
        Server(httpx.Response(200, json={"object": "webhook_secret", "secret": secret}))
    ) as client:
        assert client.verify_webhook(body, headers)["id"] == "evt_1"
