"""No prompt, secret or key in any log, whatever goes wrong; request and job ids in the lines about
them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.keys.principal import Scope
from tests.integration.conftest import ApiProcess, Served, eventually, new_key
from tests.integration.test_api_jobs import CHAT, chat_job
from tests.integration.test_webhooks import start_deliver

pytestmark = pytest.mark.integration

PROMPT = "Marzipan-prompt-4711"
PASSWORD = "Marzipan-password-4711"
TOKEN = "Marzipan-token-4711"


@dataclass
class Watched:
    """A server whose logs are read; its worker is that of `served`."""

    client: httpx.Client
    key: str
    logs: list[Path]

    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs)

    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in self.logs
            for line in path.read_text().splitlines()
            if line.startswith("{")
        ]


@pytest.fixture(scope="module")
def watched(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("logs")
    key = new_key(served.jobs, scopes=[Scope.ADMIN.value])
    with ExitStack() as stack:
        api = ApiProcess(
            served.jobs,
            folder / "api.log",
            webhook_allow_private="true",
            api_key=PASSWORD,
            retain_seconds=3600,
        )
        stack.callback(api.end)
        sender = start_deliver(served.jobs, folder / "deliver.log")
        stack.callback(lambda: (sender.kill(), sender.wait()))
        api.wait_ready()
        client = stack.enter_context(
            httpx.Client(base_url=api.url, timeout=60, headers={"authorization": f"Bearer {key}"})
        )
        yield Watched(client, key, [folder / "api.log", folder / "deliver.log", served.worker.log])


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[str, list[bytes]]]:
    """A receiver that refuses, and says the token in its answer."""
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["content-length"])))
            body = TOKEN.encode()
            self.send_response(500 if len(got) == 1 else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{TOKEN}", got
    server.shutdown()
    server.server_close()
    thread.join()


JSON = {"content-type": "application/json"}


def marked_job(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPT}]
    return chat_job(
        body={"messages": messages, "stop": [f"{PROMPT}-stop"]}, metadata={"who": PROMPT}, **more
    )


def test_nothing_that_a_client_sends_is_logged(
    watched: Watched, receiver: tuple[str, list[bytes]], served: Served
) -> None:
    url, got = receiver
    job = marked_job(
        custom_id=PROMPT, webhook={"url": f"{url}?token={TOKEN}", "inline_result": True}
    )
    ids = {"idempotency-key": f"{TOKEN}-idempotency", "x-request-id": "req-marked"}
    done = watched.client.post("/v1/jobs", json=job, headers={**ids, "prefer": "wait=30"})
    assert done.json()["status"] == "succeeded", done.text
    endpoint = watched.client.post("/v1/webhook_endpoints", json={"url": url}).json()
    body = {"model": served.model, "messages": [{"role": "user", "content": PROMPT}]}
    assert watched.client.post(CHAT, json=body).status_code == 200
    assert "data:" in watched.client.post(CHAT, json={**body, "stream": True}).text
    # What goes wrong is logged too, and must not quote either.
    wrong = [
        watched.client.post("/v1/jobs", json=marked_job(priority=PROMPT)),
        watched.client.post("/v1/jobs", content=f'{{"{PROMPT}"'.encode(), headers=JSON),
        watched.client.post("/v1/jobs", content=f'{{"{PROMPT}"'.encode()),
        watched.client.get("/v1/jobs", params={PROMPT: TOKEN}),
        watched.client.get("/v1/jobs", headers={"authorization": f"Bearer {TOKEN}"}),
        watched.client.get("/v1/jobs", params={"metadata[who]": PROMPT, "cursor": TOKEN}),
        watched.client.post(CHAT, json={**body, "max_tokens": 10**9}),
    ]
    assert [answer.status_code for answer in wrong] == [400, 400, 415, 400, 401, 400, 400]
    assert (
        watched.client.get("/v1/jobs", headers={"authorization": f"Bearer {PASSWORD}"}).status_code
        == 200
    )
    replay = watched.client.post(
        f"/v1/jobs/{done.json()['id']}/replay", headers={"prefer": "wait=30"}
    )
    assert replay.json()["replay"]["same_text"]
    eventually(lambda: len(got) >= 2, what="the webhook's second attempt")
    eventually(lambda: '"attempt": 2' in watched.text(), what="which is logged")
    logged = watched.text()
    answer = done.json()["result"]["choices"][0]["message"]["content"]
    secret = watched.client.get("/v1/webhook_secret").json()["secret"]
    for name, said in {
        "prompt": "Marzipan",
        "key": watched.key,
        "half a key": watched.key.rpartition("_")[2],
        "webhook secret": secret,
        "endpoint's secret": endpoint["secret"],
        "database's password": served.jobs.database_url.split(":")[2].split("@")[0],
        "redis' password": served.jobs.redis_url.split(":")[2].split("@")[0],
    }.items():
        assert said not in logged, name
    assert len(answer) < 4 or answer not in logged
    _ids_are_there(watched, done.json()["id"])


def _ids_are_there(watched: Watched, job_id: str) -> None:
    lines = watched.lines()
    request = next(
        line
        for line in lines
        if line.get("request_id") == "req-marked" and line["event"] == "request"
    )
    assert (request["status"], request["path"]) == (200, "/v1/jobs")
    accepted = next(
        line for line in lines if line["event"] == "job_accepted" and line["job_id"] == job_id
    )
    assert (
        accepted["request_id"] == "req-marked"
    )  # from the request to the job, from there to its worker
    worked = [line for line in lines if line.get("job_id") == job_id and "worker_id" in line]
    assert {"attempt_started", "attempt_ended"} <= {line["event"] for line in worked}
    assert all(line["attempt"] == 1 for line in worked)
    sent = [line for line in lines if line["event"] == "webhook_attempt"]
    assert any(line["job_id"] == job_id for line in sent)
    assert all({"timestamp", "level", "event", "logger"} <= set(line) for line in lines)
