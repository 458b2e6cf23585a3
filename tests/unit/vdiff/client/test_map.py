"""`map`: order, bounded concurrency, errors of single prompts, a server that goes away, another run
of the same call.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from io import StringIO
from typing import Any

import httpx
import pytest

from vdiff.client import AsyncClient, AuthenticationFailed, BadRequest, Client, JobFailed
from vdiff.progress import Bar, duration


class Echo:
    """A server whose jobs answer with their prompt: at once, later, with an error, or after a lost
    connection.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.by_key: dict[str, str] = {}
        self.lost: set[str] = set()
        self.active = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.active += 1
            self.most = max(self.most, self.active)
        time.sleep(0.002)
        with self._lock:
            self.active -= 1
            return self.answer(request)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=self.jobs[request.url.path.rpartition("/")[2]])
        text = json.loads(request.content)["body"]["messages"][0]["content"]
        key = request.headers["idempotency-key"]
        if text == "bad":
            error = {"message": "bad prompt", "code": "invalid_parameter", "param": "messages"}
            return httpx.Response(400, json={"error": error})
        if text == "forbidden":
            return httpx.Response(401, json={"error": {"message": "no", "code": "invalid_api_key"}})
        if key not in self.by_key:
            job_id = self.by_key[key] = f"job_{len(self.jobs)}"
            done = {
                "id": job_id,
                "object": "job",
                "status": "failed" if text == "fails" else "succeeded",
                "done": True,
                "error": {"code": "not_finite", "message": "NaN"} if text == "fails" else None,
                "result": {"choices": [{"message": {"content": text.upper()}}]},
            }
            self.jobs[job_id] = done
        if text == "lost" and key not in self.lost:
            self.lost.add(key)
            raise httpx.ReadError("reset")  # it was accepted, and the client does not know
        if text == "later":
            return httpx.Response(
                202, json={**self.jobs[self.by_key[key]], "status": "queued", "done": False}
            )
        return httpx.Response(200, json=self.jobs[self.by_key[key]])


def client_of(server: Echo) -> Client:
    return Client("http://test", model="m", transport=httpx.MockTransport(server))


def test_outcomes_come_in_order_and_nothing_is_paid_twice() -> None:
    server = Echo()
    prompts = ["a", "bad", "later", "lost", "fails"] + [f"p{i}" for i in range(95)]
    told: list[tuple[int, int, int | None]] = []
    with client_of(server) as client:
        outcomes = client.map(prompts, concurrency=8, progress=lambda *counts: told.append(counts))
    assert [o.index for o in outcomes] == list(range(100)) and [
        o.prompt for o in outcomes
    ] == prompts
    assert [o.text for o in outcomes[:4]] == ["A", None, "LATER", "LOST"] and outcomes[
        99
    ].text == "P94"
    assert isinstance(outcomes[1].error, BadRequest) and outcomes[1].error.param == "messages"
    assert isinstance(outcomes[4].error, JobFailed) and outcomes[4].job is not None
    assert [o.ok for o in outcomes].count(False) == 2
    assert len(server.jobs) == 99 and server.most <= 8
    assert told[-1] == (100, 2, 100) and [done for done, _, _ in told] == list(range(1, 101))


class Limited(Echo):
    """Serves one model, and lets one ask for it after a while that is longer than a single call's
    patience.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/models":
            return super().answer(request)
        self.asked += 1
        if self.asked == 1:
            error = {"message": "more than 6 requests in a minute", "code": "rate_limit_exceeded"}
            return httpx.Response(429, json={"error": error}, headers={"Retry-After": "90"})
        return httpx.Response(200, json={"data": [{"id": "m", "object": "model", "workers": 1}]})


def test_the_model_is_asked_for_once_and_with_a_maps_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vdiff.client.sync_client.sleep", lambda _: None)
    server = Limited()
    with Client("http://test", transport=httpx.MockTransport(server)) as client:
        outcomes = client.map([f"p{i}" for i in range(20)], concurrency=8, progress=False)
    assert [outcome.text for outcome in outcomes] == [
        f"P{i}" for i in range(20)
    ] and server.asked == 2


async def test_so_does_the_async_map(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None:
        pass

    monkeypatch.setattr("vdiff.client.async_client.sleep", at_once)
    server = Limited()
    async with AsyncClient("http://test", transport=httpx.MockTransport(server)) as client:
        outcomes = await client.map([f"p{i}" for i in range(20)], concurrency=8, progress=False)
    assert [outcome.ok for outcome in outcomes] == [True] * 20 and server.asked == 2


def test_the_same_call_again_takes_over_its_jobs() -> None:
    server = Echo()
    for _ in range(2):
        with client_of(server) as client:
            assert all(
                o.ok
                for o in client.map(["same", "same", "x"], idempotency_key="run-7", progress=False)
            )
    assert sorted(server.by_key) == ["run-7-0", "run-7-1", "run-7-2"]


def test_when_the_key_is_refused_the_rest_is_not_tried() -> None:
    server = Echo()
    with client_of(server) as client:
        outcomes = client.map(["a", "forbidden", "b", "c"], concurrency=1, progress=False)
    assert [o.text for o in outcomes] == ["A", None, None, None] and len(server.jobs) == 1
    assert all(isinstance(o.error, AuthenticationFailed) for o in outcomes[1:])


def test_prompts_are_read_as_they_are_needed_and_their_errors_are_raised() -> None:
    server = Echo()

    def source() -> Iterator[str]:
        for i in range(10):
            yield f"p{i}"
        raise RuntimeError("the file is broken")

    with client_of(server) as client, pytest.raises(RuntimeError, match="the file is broken"):
        client.map(source(), concurrency=2, progress=False)
    assert len(server.jobs) == 10


def test_inside_a_running_event_loop() -> None:
    """A notebook's cell runs inside one."""

    async def cell() -> list[str | None]:
        with client_of(Echo()) as client:
            return [o.text for o in client.map(["a", "b"], progress=False)]

    assert asyncio.run(cell()) == ["A", "B"]


async def test_the_async_map() -> None:
    server = Echo()
    prompts = ["a", "bad", "later", "lost", "fails"] + [f"p{i}" for i in range(20)]
    async with AsyncClient(
        "http://test", model="m", transport=httpx.MockTransport(server)
    ) as client:
        outcomes = await client.map(prompts, concurrency=4, progress=False)
    assert [o.index for o in outcomes] == list(range(25)) and [o.ok for o in outcomes].count(
        False
    ) == 2
    assert outcomes[2].text == "LATER" and outcomes[3].text == "LOST" and len(server.jobs) == 24


def test_the_bar_on_a_terminal_has_rate_time_left_and_errors_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Bar("prompts", total=10, stream=out) as bar:
        bar.update(3, 0, 10)
        bar.update(4, 2, 10)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()[-1]
    assert re.search(r"prompts .* 4/10 [\d.]+/s ETA [-\d:]+ 2 failed", last), last


def test_the_bar_in_a_log_has_no_control_codes() -> None:
    out = StringIO()
    with Bar("prompts", stream=out) as bar:
        bar.update(1, 0, 3)
        bar.update(3, 1, 3)
    assert re.fullmatch(r"prompts: 3/3, 1 failed, [\d.]+/s\n", out.getvalue())
    assert [duration(s) for s in (3.2, 75, 3720)] == ["3s", "1m15s", "1h02m"]
    hidden = StringIO()
    with Bar("prompts", stream=hidden, shown=False) as bar:
        bar.update(1)
    assert hidden.getvalue() == ""
