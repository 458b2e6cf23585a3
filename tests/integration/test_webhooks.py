"""Webhooks for real: API, worker, `vdiff deliver` and a receiver that behaves as badly as receivers
do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from shared.jobs import repository
from shared.settings import load_settings
from shared.webhooks import repository as webhooks
from shared.webhooks import senders
from tests.integration.conftest import ROOT, ApiProcess, Jobs, Served, eventually, new_key
from tests.integration.test_api_jobs import chat_job, long_job
from tests.integration.test_api_keys import auth, make_key
from vdiff.embedded import EmbeddedRedis
from worker.delivery import Pump, Sender

pytestmark = pytest.mark.integration

DELIVERY = {
    "webhook_allow_private": "true",
    "webhook_retry_seconds": "0.2,0.2,0.2",
    "webhook_timeout_seconds": "1",
    "webhook_concurrency": "8",
    "webhook_per_receiver": "2",
}


@dataclass
class Receiver:
    """Remembers requests by path; `answers[path]` says what to do: a status, or a function of the
    request's number.
    """

    url: str
    requests: dict[str, list[tuple[dict[str, str], bytes]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    answers: dict[str, Any] = field(default_factory=dict)

    def got(self, path: str, count: int = 1) -> list[tuple[dict[str, str], bytes]]:
        eventually(lambda: len(self.requests[path]) >= count, what=f"{count} at {path}")
        return list(self.requests[path])


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    found = Receiver("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.requests[self.path].append(
                ({k.lower(): v for k, v in self.headers.items()}, body)
            )
            answer = found.answers.get(self.path, 200)
            if callable(answer):
                answer = answer(len(found.requests[self.path]))
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            try:
                self.send_response(status)
                for name, value in {"content-length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
            except OSError:
                pass  # it did not wait

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def start_deliver(jobs: Jobs, log: Path, **settings: str) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    values = {
        "database_url": jobs.database_url,
        "redis_url": jobs.redis_url,
        "log_format": "json",
        **DELIVERY,
        **settings,
    }
    env.update({f"VDIFF_{name.upper()}": value for name, value in values.items()})
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "vdiff", "deliver"],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
        )


@pytest.fixture(scope="module")
def hooks(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("hooks")
    with ExitStack() as stack:
        api = ApiProcess(served.jobs, folder / "api.log", webhook_allow_private="true")
        stack.callback(api.end)
        process = start_deliver(served.jobs, folder / "deliver.log")
        stack.callback(lambda: (process.kill(), process.wait()))
        api.wait_ready()
        yield stack.enter_context(httpx.Client(base_url=api.url, timeout=60))


@pytest.fixture
def mine(served: Served) -> dict[str, str]:
    return auth(make_key(served))


def register(
    hooks: httpx.Client, receiver: Receiver, path: str, mine: dict[str, str], **more: Any
) -> dict[str, Any]:
    answer = hooks.post(
        "/v1/webhook_endpoints", json={"url": receiver.url + path, **more}, headers=mine
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def run(
    hooks: httpx.Client, mine: dict[str, str], job: dict[str, Any] | None = None
) -> dict[str, Any]:
    done: dict[str, Any] = hooks.post(
        "/v1/jobs", json=job or chat_job(), headers={**mine, "prefer": "wait=30"}
    ).json()
    assert done["status"] == "succeeded", done
    return done


def deliveries(
    hooks: httpx.Client, endpoint: dict[str, Any], mine: dict[str, str], **params: Any
) -> list[Any]:
    found = hooks.get(
        f"/v1/webhook_endpoints/{endpoint['id']}/deliveries", params=params, headers=mine
    ).json()
    data: list[Any] = found["data"]
    return data


def test_a_registered_endpoint_is_told_and_can_verify(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    every = ["job.queued", "job.started", "job.succeeded"]
    endpoint = register(hooks, receiver, "/all", mine, events=every)
    job = run(hooks, mine)
    arrived = receiver.got("/all", 3)
    bodies = [Webhook(endpoint["secret"]).verify(body, headers) for headers, body in arrived]
    assert [b["id"] for b in bodies] == [headers["webhook-id"] for headers, _ in arrived]
    bodies.sort(key=lambda b: b["data"]["sequence"])
    assert [(b["type"], b["data"]["sequence"]) for b in bodies] == [
        (t, i + 1) for i, t in enumerate(every)
    ]
    assert all(b["data"]["id"] == job["id"] and b["object"] == "event" for b in bodies)
    assert hooks.get(bodies[-1]["data"]["result_url"], headers=mine).json() == job["result"]
    eventually(
        lambda: [d["status"] for d in deliveries(hooks, endpoint, mine)] == ["delivered"] * 3
    )
    assert [d["attempts"][0]["status_code"] for d in deliveries(hooks, endpoint, mine)] == [200] * 3
    assert receiver.got("/all")[0][0]["host"] == receiver.url.removeprefix("http://")


def test_a_batchs_end_is_told(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    ends = ["batch.completed", "batch.failed"]
    endpoint = register(hooks, receiver, "/batch", mine, events=ends, metadata_filter={"team": "x"})

    def begin(team: str, lines: list[dict[str, Any]]) -> str:
        content = "".join(
            json.dumps({"method": "POST", "url": "/v1/completions", **line}) + "\n"
            for line in lines
        )
        form = {
            "files": {"file": ("in.jsonl", content.encode())},
            "data": {"purpose": "batch"},
            "headers": mine,
        }
        file = hooks.post("/v1/files", **form).json()["id"]  # type: ignore[arg-type]
        body = {
            "input_file_id": file,
            "endpoint": "/v1/completions",
            "completion_window": "1h",
            "metadata": {"team": team},
        }
        return str(hooks.post("/v1/batches", json=body, headers=mine).json()["id"])

    good = {
        "custom_id": "a",
        "body": {"model": "vdiff-tiny", "prompt": "What is 1 + 1?", "max_tokens": 8},
    }
    begin("y", [good])  # the endpoint's filter leaves it out
    completed, failed = begin("x", [good]), begin("x", [{"custom_id": "a", "body": {}}])
    told = {}
    for headers, body in receiver.got("/batch", 2):
        event = Webhook(endpoint["secret"]).verify(body, headers)
        told[event["data"]["id"]] = event
    assert {batch: event["type"] for batch, event in told.items()} == dict(
        zip((completed, failed), ends, strict=True)
    )
    batch = hooks.get(told[completed]["data"]["result_url"], headers=mine).json()
    assert (batch["id"], batch["status"], batch["request_counts"]["completed"]) == (
        completed,
        "completed",
        1,
    )
    assert {d["batch_id"] for d in deliveries(hooks, endpoint, mine)} == {completed, failed}


def test_a_jobs_own_url_with_the_result_inline(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    webhook = {"url": f"{receiver.url}/own", "inline_result": True}
    job = run(hooks, mine, chat_job(webhook=webhook))
    assert job["webhook"]["url"] == webhook["url"]
    secret = hooks.get("/v1/webhook_secret", headers=mine).json()["secret"]
    headers, body = receiver.got("/own")[0]
    assert Webhook(secret).verify(body, headers)["data"]["result"] == job["result"]
    found = hooks.get("/v1/deliveries", params={"job_id": job["id"]}, headers=mine).json()["data"]
    assert [d["url"] for d in found] == [webhook["url"]]


def test_results_reach_only_urls_that_a_key_with_the_scope_jobs_chose(
    hooks: httpx.Client, receiver: Receiver, served: Served
) -> None:
    tenant = f"team-{time.time_ns()}"
    reader = auth(new_key(served.jobs, tenant=tenant))
    watcher = auth(new_key(served.jobs, tenant=tenant, scopes=["webhooks"]))

    def change(
        endpoint: dict[str, Any], who: dict[str, str], **body: Any
    ) -> tuple[int, str | None]:
        answer = hooks.post(f"/v1/webhook_endpoints/{endpoint['id']}", json=body, headers=who)
        return answer.status_code, answer.json().get("error", {}).get("param")

    asked = {"url": f"{receiver.url}/thief", "inline_result": True}
    refused = hooks.post("/v1/webhook_endpoints", json=asked, headers=watcher)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert refused.json()["error"]["param"] == "inline_result"
    plain = register(hooks, receiver, "/plain", watcher)
    assert change(plain, watcher, inline_result=True) == (403, "inline_result")
    assert change(plain, watcher, url=f"{receiver.url}/plain2") == (200, None)
    endpoint = register(hooks, receiver, "/inline", reader, inline_result=True)
    job = run(hooks, reader)
    assert json.loads(receiver.got("/inline")[0][1])["data"]["result"] == job["result"]
    # Neither by another URL nor by another URL and a redelivery of what was recorded with the
    # result.
    assert change(endpoint, watcher, url=f"{receiver.url}/thief") == (403, "url")
    assert change(endpoint, watcher, url=f"{receiver.url}/thief", enabled=True) == (403, "url")
    assert change(endpoint, watcher, description="mine", url=endpoint["url"]) == (200, None)
    assert change(endpoint, watcher, url=f"{receiver.url}/thief", inline_result=False) == (
        200,
        None,
    )
    delivery = eventually(
        lambda: [d for d in deliveries(hooks, endpoint, watcher) if d["status"] == "delivered"]
    )[0]
    assert (
        hooks.post(f"/v1/deliveries/{delivery['id']}/redeliver", headers=watcher).status_code == 202
    )
    again = json.loads(receiver.got("/thief")[0][1])
    assert again["data"]["id"] == job["id"] and "result" not in again["data"]
    assert change(endpoint, watcher, inline_result=True) == (403, "inline_result")
    assert change(endpoint, reader, inline_result=True) == (200, None)
    assert not [body for _, body in receiver.requests["/plain2"] if b'"result":' in body]


def test_a_clients_trace_reaches_its_receiver(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    run(hooks, {**mine, "traceparent": parent}, chat_job(webhook={"url": f"{receiver.url}/traced"}))
    assert receiver.got("/traced")[0][0]["traceparent"] == parent
    run(
        hooks,
        {**mine, "traceparent": "00-nothing"},
        chat_job(webhook={"url": f"{receiver.url}/untraced"}),
    )
    assert "traceparent" not in receiver.got("/untraced")[0][0]


def test_without_a_key_the_tenants_secret_signs(hooks: httpx.Client, receiver: Receiver) -> None:
    run(hooks, {}, chat_job(webhook={"url": f"{receiver.url}/anonymous"}))
    headers, body = receiver.got("/anonymous")[0]
    Webhook(hooks.get("/v1/webhook_secret").json()["secret"]).verify(body, headers)


def test_a_job_that_names_an_endpoint_and_filters(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    endpoint = register(hooks, receiver, "/named", mine, events=["job.failed"])
    register(hooks, receiver, "/filtered", mine, metadata_filter={"team": "a"})
    run(hooks, mine, chat_job(webhook={"endpoint_id": endpoint["id"], "events": ["job.started"]}))
    run(hooks, mine, chat_job(metadata={"team": "a"}))
    assert len(receiver.got("/named")) == len(receiver.got("/filtered")) == 1
    unknown = hooks.post(
        "/v1/jobs", json=chat_job(webhook={"endpoint_id": "we_" + "0" * 26}), headers=mine
    )
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "webhook.endpoint_id")


def test_retries_keep_the_id_and_every_attempt_is_listed(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    receiver.answers["/flaky"] = lambda n: [
        500,
        (302, {"location": f"{receiver.url}/elsewhere"}),
        204,
    ][n - 1]
    endpoint = register(hooks, receiver, "/flaky", mine)
    run(hooks, mine)
    got = receiver.got("/flaky", 3)
    assert len({headers["webhook-id"] for headers, _ in got}) == 1
    assert len({body for _, body in got}) == 1
    eventually(lambda: deliveries(hooks, endpoint, mine)[0]["status"] == "delivered")
    attempts = deliveries(hooks, endpoint, mine)[0]["attempts"]
    assert [(a["attempt"], a["status_code"]) for a in attempts] == [(1, 500), (2, 302), (3, 204)]
    assert receiver.requests["/elsewhere"] == []  # no redirect is followed


def test_410_disables_and_a_dead_endpoint_too(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    receiver.answers.update({"/gone": 410, "/dead": 500})
    gone, dead = register(hooks, receiver, "/gone", mine), register(hooks, receiver, "/dead", mine)
    run(hooks, mine)

    def state(endpoint: dict[str, Any]) -> Any:
        shown = hooks.get(f"/v1/webhook_endpoints/{endpoint['id']}", headers=mine).json()
        return shown["enabled"], shown["disabled_reason"]

    eventually(lambda: state(gone) == (False, "gone") and state(dead) == (False, "dead"))
    assert (len(receiver.requests["/gone"]), len(receiver.requests["/dead"])) == (
        1,
        4,
    )  # the schedule has 3 waits
    run(hooks, mine)
    assert [d["status"] for d in deliveries(hooks, gone, mine)] == [
        "discarded",
        "failed",
    ]  # newest first; it is not asked again
    assert len(receiver.requests["/gone"]) == 1
    receiver.answers["/dead"] = 200
    again = f"/v1/webhook_endpoints/{dead['id']}"
    refused = hooks.post(f"{again}/redeliver", json={"since": 0}, headers=mine)
    assert refused.status_code == 409
    hooks.post(again, json={"enabled": True}, headers=mine)
    # What it failed to take, and what happened while it was disabled.
    assert hooks.post(f"{again}/redeliver", json={"since": 0}, headers=mine).json()["count"] == 2
    eventually(
        lambda: [d["status"] for d in deliveries(hooks, dead, mine)] == ["delivered", "delivered"]
    )


def test_redelivery_of_one_and_the_test_event(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    endpoint = register(hooks, receiver, "/again", mine)
    tested = hooks.post(f"/v1/webhook_endpoints/{endpoint['id']}/test", headers=mine).json()
    headers, body = receiver.got("/again")[0]
    assert Webhook(endpoint["secret"]).verify(body, headers)["type"] == "webhook.test"
    eventually(lambda: deliveries(hooks, endpoint, mine, status="delivered"))
    assert (
        hooks.post(f"/v1/deliveries/{tested['delivery_id']}/redeliver", headers=mine).status_code
        == 202
    )
    assert len({h["webhook-id"] for h, _ in receiver.got("/again", 2)}) == 1
    other = auth("vdk_nobody")
    assert (
        hooks.post(f"/v1/deliveries/{tested['delivery_id']}/redeliver", headers=other).status_code
        == 404
    )
    assert hooks.get(f"/v1/webhook_endpoints/{endpoint['id']}", headers=other).status_code == 404
    assert endpoint["id"] not in hooks.get("/v1/webhook_endpoints", headers=other).text


def test_deliveries_are_told_as_they_change(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    endpoint = register(hooks, receiver, "/told", mine)
    url = f"/v1/deliveries/events?endpoint_id={endpoint['id']}"
    with hooks.stream("GET", url, headers=mine) as answer:
        rows = (
            json.loads(row[6:])["data"] for row in answer.iter_lines() if row.startswith("data: ")
        )
        assert next(rows) == []
        job = run(hooks, mine)
        shown = next(rows)
        while shown[0]["status"] != "delivered":
            shown = next(rows)
        assert (shown[0]["job_id"], shown[0]["attempts"][0]["status_code"]) == (job["id"], 200)
    assert hooks.get(url).status_code == 404  # another tenant
    for bad in ("", "?job_id=x", f"?job_id={job['id']}&endpoint_id={endpoint['id']}"):
        answer = hooks.get(f"/v1/deliveries/events{bad}", headers=mine)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "job_id")


def test_while_a_secret_rotates_both_sign(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    endpoint = register(hooks, receiver, "/rotate", mine)
    path = f"/v1/webhook_endpoints/{endpoint['id']}"
    fresh = hooks.post(f"{path}/rotate_secret", headers=mine).json()["secret"]
    hooks.post(f"{path}/test", headers=mine)
    headers, body = receiver.got("/rotate")[0]
    for secret in (endpoint["secret"], fresh):
        Webhook(secret).verify(body, headers)
    hooks.post(f"{path}/rotate_secret", json={"grace_seconds": 0}, headers=mine)
    hooks.post(f"{path}/test", headers=mine)
    assert " " not in receiver.got("/rotate", 2)[1][0]["webhook-signature"]
    assert "secret" not in hooks.get(path, headers=mine).json()


@pytest.mark.parametrize("keyed", [True, False])
def test_the_secret_of_single_jobs_rotates_too(
    hooks: httpx.Client, receiver: Receiver, served: Served, keyed: bool
) -> None:
    headers = auth(make_key(served, "--scope", "jobs")) if keyed else {}
    former = hooks.get("/v1/webhook_secret", headers=headers).json()["secret"]
    path = f"/rotated-{keyed}"

    def told(number: int) -> tuple[dict[str, str], bytes]:
        body = chat_job(webhook={"url": receiver.url + path, "events": ["job.succeeded"]})
        assert hooks.post("/v1/jobs", json=body, headers=headers).status_code == 202
        found = receiver.got(path, number)[number - 1]
        return {k.lower(): v for k, v in found[0].items()}, found[1]

    newer = hooks.post("/v1/webhook_secret/rotate", headers=headers).json()["secret"]
    assert (
        newer != former
        and hooks.get("/v1/webhook_secret", headers=headers).json()["secret"] == newer
    )
    sent, body = told(1)
    for secret in (former, newer):
        Webhook(secret).verify(body, sent)
    newest = hooks.post(
        "/v1/webhook_secret/rotate", json={"grace_seconds": 0}, headers=headers
    ).json()["secret"]
    sent, body = told(2)
    Webhook(newest).verify(body, sent)
    assert " " not in sent["webhook-signature"]
    bad = hooks.post("/v1/webhook_secret/rotate", json={"grace_seconds": -1}, headers=headers)
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "grace_seconds")


def test_a_receiver_that_hangs_holds_up_nobody(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    receiver.answers["/hangs"] = lambda n: (time.sleep(3), 200)[1]
    slow = register(hooks, receiver, "/hangs", mine)
    for _ in range(12):  # more than the process sends at once
        hooks.post(f"/v1/webhook_endpoints/{slow['id']}/test", headers=mine)
    quick = register(hooks, receiver, "/quick", mine)
    for _ in range(6):
        hooks.post(f"/v1/webhook_endpoints/{quick['id']}/test", headers=mine)
    eventually(lambda: len(deliveries(hooks, quick, mine, status="delivered")) == 6)
    assert deliveries(hooks, slow, mine, status="delivered") == []
    assert "no answer within" in eventually(
        lambda: next(
            (d["attempts"][0]["error"] for d in deliveries(hooks, slow, mine) if d["attempts"]),
            None,
        )
    )
    hooks.delete(f"/v1/webhook_endpoints/{slow['id']}", headers=mine)


@pytest.mark.parametrize("skip_from", [None, 1])
def test_a_long_queue_of_one_receiver_hides_no_other(jobs: Jobs, skip_from: int | None) -> None:
    """A round looks at 50 times its room; behind more than that of one that hangs, the others are
    found all the same.
    """
    first = pending(jobs, "http://hangs.example/hook")
    other = pending(jobs, "http://quick.example/hook")
    jobs.execute(
        text(
            "INSERT INTO webhook_deliveries (event_id, tenant, url, next_attempt_at) SELECT event_id, tenant, url, "
            "now() - interval '1 hour' FROM webhook_deliveries, generate_series(1, 60) WHERE id = :id RETURNING id"
        ).bindparams(id=first)
    )
    taken = [
        row.id
        for _ in range(4)
        for row in jobs.execute(
            webhooks.lease_due(
                lease_seconds=60, limit=1, per_receiver=2, per_tenant=9, skip_from=skip_from
            )
        )
    ]
    assert taken.index(other) == (2 if skip_from is None else 1)
    assert len(taken) == (
        3 if skip_from is None else 2
    )  # the rest waits until the receiver has room


def test_receivers_of_a_tenant_and_urls_of_a_host_are_bounded_together(jobs: Jobs) -> None:
    """A job's own URL usually names the job: each would be a receiver of its own. And a tenant may
    register many that hang.
    """
    same_host = [pending(jobs, f"https://hangs.example/hook?job={n}") for n in range(4)]
    hosts = [pending(jobs, f"https://hangs-{n}.example/hook") for n in range(4)]
    other = pending(jobs, "https://hangs.example/hook?job=other")
    jobs.execute(
        text(
            "UPDATE webhook_deliveries SET tenant = 'other' WHERE id = :id RETURNING id"
        ).bindparams(id=other)
    )

    def round(limit: int) -> set[int]:
        statement = webhooks.lease_due(lease_seconds=60, limit=limit, per_receiver=2, per_tenant=5)
        return {row.id for row in jobs.execute(statement)}

    taken = round(4) | round(20) | round(20)
    assert other in taken
    assert len(taken & set(same_host)) <= 2
    assert len(taken & {*same_host, *hosts}) == 5


def test_old_events_are_forgotten_as_fast_as_they_come(jobs: Jobs) -> None:
    pending(jobs, "http://old.example/hook")
    jobs.execute(text("UPDATE webhook_deliveries SET status = 'delivered' RETURNING id"))
    jobs.execute(
        text(
            "INSERT INTO webhook_events (id, tenant, type, job_id, status, sequence, created_at) SELECT 'evt_' || n, tenant, "
            "type, job_id, status, n + 1, now() - interval '90 days' FROM webhook_events, generate_series(1, 1200) n "
            "RETURNING id"
        )
    )
    pump = Pump(jobs.database, jobs.redis, load_settings({}), "sender_x")
    counts = []
    for _ in range(4):
        pump.clean()
        counts.append(jobs.execute(text("SELECT count(*) AS n FROM webhook_events"))[0].n)
    assert counts == [701, 201, 1, 1]


def test_retry_after_is_honoured(jobs: Jobs, receiver: Receiver) -> None:
    receiver.answers["/later"] = (503, {"retry-after": "3600"})
    delivery_id = pending(jobs, f"{receiver.url}/later")
    sender = Sender(
        jobs.database, load_settings({}, webhook_allow_private=True, webhook_retry_seconds=(1.0,))
    )
    sender.deliver(delivery_id)
    sender.close()
    row = jobs.execute(
        text("SELECT status, next_attempt_at - now() AS wait FROM webhook_deliveries")
    )[0]
    assert row.status == "pending"
    assert 3500 < row.wait.total_seconds() <= 3600


def pending(jobs: Jobs, url: str) -> int:
    """A delivery to that URL; the job is cancelled by hand, in one transaction with its event."""
    from shared.webhooks.secrets import new_secret

    job_id = jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(webhooks.ensure_secret("anonymous", new_secret()))
        webhook = json.dumps({"events": ["job.cancelled"], "url": url})
        session.execute(
            text("UPDATE jobs SET webhook = CAST(:w AS jsonb) WHERE id = :id"),
            {"w": webhook, "id": job_id},
        )
    jobs.execute(repository.request_cancel(job_id))
    query = "SELECT d.id FROM webhook_deliveries d JOIN webhook_events e ON e.id = d.event_id WHERE e.job_id = :job"
    found = jobs.execute(text(query).bindparams(job=job_id))
    assert len(found) == 1
    return int(found[0].id)


def test_the_event_comes_and_goes_with_the_move(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    with jobs.database.write() as session:
        webhook = '{"events": ["job.cancelled"], "url": "https://x.example"}'
        session.execute(
            text("UPDATE jobs SET webhook = CAST(:w AS jsonb) WHERE id = :id"),
            {"w": webhook, "id": job_id},
        )
    with pytest.raises(RuntimeError), jobs.database.write() as session:
        session.execute(repository.request_cancel(job_id))
        raise RuntimeError
    assert jobs.execute(text("SELECT id FROM webhook_events")) == []
    jobs.execute(repository.request_cancel(job_id))
    assert len(jobs.execute(text("SELECT id FROM webhook_events"))) == 1


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"])
def test_a_name_that_turns_private_is_refused_at_each_attempt(jobs: Jobs, address: str) -> None:
    """DNS rebinding: accepted when it was registered, private when it is called. Nothing is sent."""
    asked: list[str] = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return [address]

    sender = Sender(
        jobs.database, load_settings({}, webhook_retry_seconds=(0.0, 0.0)), resolver=resolver
    )
    delivery_id = pending(jobs, "https://rebind.example/hook")
    for _ in range(3):
        sender.deliver(delivery_id)
    sender.close()
    assert asked == ["rebind.example"] * 3
    errors = [row.error for row in jobs.execute(text("SELECT error FROM webhook_attempts"))]
    assert len(errors) == 3
    assert all(e.startswith("refused: ") and address not in e for e in errors)
    assert jobs.execute(text("SELECT status FROM webhook_deliveries"))[0].status == "failed"


def test_it_connects_to_the_address_that_was_checked(jobs: Jobs, receiver: Receiver) -> None:
    port = receiver.url.rpartition(":")[2]
    sender = Sender(
        jobs.database,
        load_settings({}, webhook_allow_private=True),
        resolver=lambda h, p: ["127.0.0.1"],
    )
    sender.deliver(pending(jobs, f"http://no-such-name.example:{port}/pinned"))
    sender.close()
    assert receiver.got("/pinned")[0][0]["host"] == f"no-such-name.example:{port}"


def test_the_second_address_is_tried_when_the_first_refuses(jobs: Jobs, receiver: Receiver) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", 0))
    port = receiver.url.rpartition(":")[2]
    sender = Sender(
        jobs.database,
        load_settings({}, webhook_allow_private=True),
        resolver=lambda h, p: ["127.0.0.2", "127.0.0.1"],
    )
    sender.deliver(pending(jobs, f"http://two.example:{port}/second"))
    sender.close()
    assert len(receiver.got("/second")) == 1


def test_a_sender_that_is_killed_loses_nothing(
    jobs: Jobs, receiver: Receiver, tmp_path: Path
) -> None:
    """Killed with a delivery on its way: when the lease is over another process sends it, under the
    same id.
    """
    receiver.answers["/killed"] = lambda n: (time.sleep(0.9 if n == 1 else 0), 200)[1]
    delivery_id = pending(jobs, f"{receiver.url}/killed")
    alone = jobs.redis_url.rpartition("/")[0] + "/9"  # apart from the process of the other tests
    first = start_deliver(jobs, tmp_path / "first.log", redis_url=alone)
    try:
        receiver.got("/killed")
    finally:
        first.kill()
        first.wait(10)
    with jobs.database.write() as session:  # instead of waiting for a minute
        session.execute(
            text("UPDATE webhook_deliveries SET lease_until = now() WHERE status = 'pending'")
        )
    second = start_deliver(jobs, tmp_path / "second.log", redis_url=alone)
    try:
        eventually(
            lambda: (
                jobs.execute(
                    text(f"SELECT status FROM webhook_deliveries WHERE id = {delivery_id}")
                )[0].status
                == "delivered"
            )
        )
        assert len({h["webhook-id"] for h, _ in receiver.got("/killed", 2)}) == 1
        second.send_signal(signal.SIGTERM)
        assert second.wait(240) == 0
    finally:
        second.kill()
        second.wait()


def test_an_event_of_each_end(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str]
) -> None:
    register(hooks, receiver, "/ends", mine)
    job = hooks.post("/v1/jobs", json=long_job(), headers=mine).json()
    hooks.post(f"/v1/jobs/{job['id']}/cancel", headers=mine)
    expired = hooks.post(
        "/v1/jobs", json=long_job(deadlines={"max_run_seconds": 0.2}), headers=mine
    ).json()
    bodies = [json.loads(body) for _, body in receiver.got("/ends", 2)]
    assert {(b["data"]["id"], b["type"]) for b in bodies} == {
        (job["id"], "job.cancelled"),
        (expired["id"], "job.expired"),
    }


def test_private_targets_are_refused_by_default(served: Served) -> None:
    for url in ("http://127.0.0.1:9/x", "https://localhost:22/"):
        answer = served.client.post("/v1/webhook_endpoints", json={"url": url})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")


def value(hooks: httpx.Client, series: str) -> float:
    lines = [
        line for line in hooks.get("/metrics").text.splitlines() if line.startswith(series + " ")
    ]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def test_every_attempt_is_counted_and_a_sender_is_seen_alive(
    hooks: httpx.Client, receiver: Receiver, mine: dict[str, str], served: Served
) -> None:
    names = [
        f'vdiff_webhook_attempts_total{{outcome="{o}"}}'
        for o in ("delivered", "status", "timeout", "unreachable")
    ]
    names += [
        "vdiff_webhook_attempt_seconds_count",
        'vdiff_webhook_endpoints_disabled_total{reason="gone"}',
    ]
    before = [value(hooks, name) for name in names]
    receiver.answers["/counted"] = lambda n: 500 if n == 1 else 200
    receiver.answers["/slow"] = lambda n: (time.sleep(1.5 if n == 1 else 0), 200)[1]
    receiver.answers["/gone-metric"] = 410
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/nobody"
        for path in ("/counted", "/slow", "/gone-metric"):
            register(hooks, receiver, path, mine)
        hooks.post("/v1/webhook_endpoints", json={"url": nobody}, headers=mine)
        run(hooks, mine)
        eventually(
            lambda: all(value(hooks, n) > b for n, b in zip(names, before, strict=True)),
            seconds=30,
            what="counted",
        )
    assert value(hooks, 'vdiff_webhook_endpoints{state="disabled"}') >= 1
    assert value(hooks, 'vdiff_webhook_endpoints{state="enabled"}') >= 1
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env["VDIFF_DATABASE_URL"] = served.jobs.database_url
    command = [sys.executable, "-m", "vdiff", "health", "deliver"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alive: sender_" in done.stdout


def test_what_waits_and_how_late_it_is(jobs: Jobs) -> None:
    from api.routes.metrics import webhook_metrics

    def shown() -> dict[str, float]:
        rows = [
            jobs.execute(s) for s in (senders.waiting(), senders.endpoints(), senders.all_metrics())
        ]
        return {
            s.name: s.value
            for family in webhook_metrics(*rows)
            for s in family.samples
            if not s.labels
        }

    assert shown()["vdiff_webhook_deliveries_pending"] == shown()["vdiff_webhook_late_seconds"] == 0
    for url in ("https://a.example/", "https://b.example/"):
        pending(jobs, url)
    with jobs.database.write() as session:
        session.execute(
            text(
                "UPDATE webhook_deliveries SET next_attempt_at = now() - interval '1 h' WHERE url LIKE '%b.%'"
            )
        )
    assert shown()["vdiff_webhook_deliveries_pending"] == 2
    assert 3600 <= shown()["vdiff_webhook_late_seconds"] < 3700
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE webhook_deliveries SET next_attempt_at = now() + interval '1 h'")
        )
    assert shown()["vdiff_webhook_late_seconds"] == 0  # nothing is due


def test_deliveries_go_on_after_redis_was_away(
    jobs: Jobs, receiver: Receiver, tmp_path: Path
) -> None:
    redis = EmbeddedRedis(tmp_path / "redis")
    sender = start_deliver(jobs, tmp_path / "deliver.log", redis_url=redis.start())

    def delivered(delivery_id: int) -> bool:
        rows = jobs.execute(text(f"SELECT status FROM webhook_deliveries WHERE id = {delivery_id}"))
        return bool(rows[0].status == "delivered")

    try:
        first = pending(jobs, f"{receiver.url}/before")
        eventually(lambda: delivered(first), seconds=40, what="the sender works")
        redis.stop()
        while_away = pending(jobs, f"{receiver.url}/away")
        eventually(
            lambda: "duty_failed" in (tmp_path / "deliver.log").read_text(),
            what="the sender noticed",
        )
        assert not delivered(while_away)
        redis.start()
        eventually(lambda: delivered(while_away), seconds=40, what="what came meanwhile is sent")
        assert sender.poll() is None
        assert len(receiver.got("/away")) == 1
    finally:
        sender.kill()
        sender.wait()
        redis.stop()
