"""`GET /v1/usage`, `GET /v1/queue`, and what belongs to a key rather than to its tenant. Over real
HTTP, and by the trigger.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from shared import serving
from shared.jobs import repository
from shared.jobs.status import JobStatus
from shared.keys.principal import Scope
from shared.model_card import ModelCard
from shared.usage import repository as usage
from tests.integration.conftest import Jobs, Served, eventually, new_key
from tests.integration.test_api_jobs import CHAT, QUESTION, chat_job
from tests.integration.test_api_keys import auth, key_id_of

pytestmark = pytest.mark.integration
AWAY = "queue-away"


@pytest.fixture(scope="module")
def away(served: Served) -> str:
    with served.jobs.database.write() as session:
        row = session.execute(serving.get_model("vdiff-tiny")).one()
        session.execute(
            serving.register_model(
                ModelCard.from_json({**row.card, "name": AWAY}), row.tokenizer_files
            )
        )
    time.sleep(1.1)  # what the API trusts a list of models for
    return AWAY


def used(served: Served, key: dict[str, str], **params: Any) -> dict[str, Any]:
    answer = served.client.get("/v1/usage", headers=key, params=params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_usage_adds_up(served: Served) -> None:
    tenant = f"usage-{time.time_ns()}"
    keys = [new_key(served.jobs, tenant=tenant) for _ in range(2)]
    done: list[dict[str, Any]] = []
    for key, count in zip(keys, (2, 1), strict=True):
        for _ in range(count):
            answer = served.client.post(
                "/v1/jobs", json=chat_job(), headers={**auth(key), "prefer": "wait=30"}
            )
            done.append(answer.json())
    chat = served.client.post(
        CHAT, json={"model": served.model, "messages": QUESTION}, headers=auth(keys[0])
    ).json()
    whole = used(served, auth(keys[1]))
    total, rows = whole["total"], whole["data"]
    assert (whole["scope"], total["jobs"]["total"], total["jobs"]["succeeded"]) == ("own", 4, 4)
    assert {r["key_id"]: r["jobs"]["total"] for r in rows} == {
        key_id_of(keys[0]): 3,
        key_id_of(keys[1]): 1,
    }
    for name in ("prompt_tokens", "completion_tokens"):
        expected = sum(j["usage"][name] for j in done) + chat["usage"][name]
        assert total[name] == expected == sum(r[name] for r in rows) > 0
    assert (
        total["forwards"]
        == sum(j["diffusion"]["forwards"] for j in done) + chat["vdiff"]["forwards"]
    )
    device = sum(j["timing"]["device_ms"] for j in done) + chat["vdiff"]["timing"]["device_ms"]
    assert total["device_seconds"] == pytest.approx(device / 1000, abs=0.01) and device > 0
    assert total["run_seconds"] > 0 and total["attempts"] == 4
    only = used(served, auth(keys[0]), key_id=key_id_of(keys[1]), model=served.model)
    assert only["total"]["jobs"]["total"] == 1
    yesterday = (datetime.now(UTC) - timedelta(days=2)).date().isoformat()
    assert used(served, auth(keys[0]), since=yesterday, until=yesterday)["data"] == []
    assert used(served, auth(new_key(served.jobs)))["data"] == []  # somebody else
    admin = used(served, auth(new_key(served.jobs, scopes=[Scope.ADMIN.value])))
    assert (admin["scope"], admin["data"]) == ("own", [])  # of its own tenant alone
    everything = used(served, {})  # nobody needs a key on loopback: the operator
    assert everything["scope"] == "all" and {tenant} <= {r["tenant"] for r in everything["data"]}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-13-01"}, "until"),
        ({"since": "2026-02-01", "until": "2026-01-01"}, "since"),
        ({"since": "2020-01-01", "until": "2026-01-01"}, "since"),
        ({"days": "3"}, "days"),
    ],
)
def test_bad_spans_are_refused_by_name(served: Served, query: dict[str, str], param: str) -> None:
    answer = served.client.get("/v1/usage", params=query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert served.client.get("/v1/usage", params={"until": "0001-01-02"}).status_code == 200


def test_each_life_and_each_attempt_is_counted_once(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)

    def claim() -> int:
        attempt: int = jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))[
            0
        ].attempt
        return attempt

    error = {"code": "x", "message": "x", "param": None, "retryable": True}
    jobs.execute(repository.drain([(job_id, claim())]))
    jobs.execute(repository.fail_attempt(job_id, claim(), error=error))
    jobs.execute(
        repository.finish(
            job_id,
            claim(),
            JobStatus.FAILED,
            error=error,
            usage={"prompt_tokens": 3, "completion_tokens": 4},
        )
    )
    with jobs.database.write() as session:
        session.execute(usage.roll_up())
    jobs.execute(repository.retry(job_id, "anonymous", key_id="key_b"))
    numbers = {
        "usage": {"prompt_tokens": 3, "completion_tokens": 5},
        "timing": {"device_ms": 250.0},
        "diffusion": {"forwards": 7},
    }
    attempt = claim()
    for _ in range(2):  # the second is fenced
        jobs.execute(
            repository.finish(job_id, attempt, JobStatus.SUCCEEDED, result={"a": 1}, **numbers)
        )
    queued = jobs.submit(push=0)
    jobs.execute(repository.request_cancel(queued))
    today = datetime.now(UTC).date()
    statement = usage.used("anonymous", first=today - timedelta(days=1), last=today)
    for _ in range(2):  # before and after it is summed up
        first, second = sorted(jobs.execute(statement), key=lambda r: r.key_id)
        assert (first.failed, first.cancelled, first.attempts, first.completion_tokens) == (
            1,
            1,
            3,
            4,
        )
        assert (second.key_id, second.succeeded, second.attempts, second.completion_tokens) == (
            "key_b",
            1,
            1,
            5,
        )
        assert (second.forwards, second.device_seconds) == (7, 0.25)
        with jobs.database.write() as session:
            session.execute(usage.roll_up())
    assert jobs.execute(text("SELECT count(*) AS n FROM usage_deltas"))[0].n == 0


def queue(
    served: Served, key: dict[str, str], model: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    shown = served.client.get("/v1/queue", params={"model": model}, headers=key).json()["data"][0]
    return shown, {lane["priority"]: lane for lane in shown["lanes"]}


def test_the_queue_tells_sums_and_ones_own_place(served: Served, away: str) -> None:
    tenant = f"queue-{time.time_ns()}"
    mine, ours, theirs = (
        auth(new_key(served.jobs, tenant=t)) for t in (tenant, tenant, f"not-{tenant}")
    )
    urls = []
    for key, count, priority in (
        (mine, 2, "normal"),
        (ours, 1, "normal"),
        (theirs, 5, "normal"),
        (theirs, 1, "interactive"),
    ):
        for _ in range(count):
            job = served.client.post(
                "/v1/jobs", json=chat_job(body={"model": away}, priority=priority), headers=key
            )
            assert job.status_code == 202, job.text
            urls.append((job.json()["urls"]["cancel"], key))
    shown, found = queue(served, mine, away)
    assert (shown["workers"], shown["slots"], list(found)) == (
        0,
        0,
        ["interactive", "normal", "bulk"],
    )
    normal = found["normal"]
    assert (normal["waiting"], normal["own"]["waiting"], normal["running"]) == (8, 2, 0)
    assert normal["own"]["waiting_tokens"] * 4 == normal["waiting_tokens"] > 0
    assert normal["oldest_seconds"] >= 0 and normal["messages"] == 4  # no worker: the least window
    assert found["interactive"]["own"] == {
        "waiting": 0,
        "waiting_tokens": 0,
        "oldest_seconds": None,
        "running": 0,
    }
    # Behind the urgent one, its own two, and a turn of each other key: of three, of one.
    assert normal["next_job"]["queue_position"] == 1 + 2 + 3 + 1 + 1
    assert (normal["next_job"]["eta_seconds"], normal["next_job"]["eta_range_seconds"]) == (
        None,
        None,
    )
    assert tenant not in served.client.get("/v1/queue", headers=theirs).text
    for url, key in urls:
        assert served.client.post(url, headers=key).status_code == 200
    assert queue(served, mine, away)[1]["normal"]["waiting"] == 0
    here, _ = queue(served, mine, served.model)
    assert (here["workers"], here["slots"], here["window"]) == (1, 4, 4)
    eventually(
        lambda: (
            queue(served, mine, served.model)[1]["normal"]["next_job"]["eta_seconds"] is not None
        )
    )
    missing = served.client.get("/v1/queue", params={"model": "none"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_limits_and_idempotency_keys_are_a_keys_own(served: Served, away: str) -> None:
    tenant = f"own-{time.time_ns()}"
    tight, other = (
        auth(new_key(served.jobs, tenant=tenant, max_queued_jobs=most)) for most in (1, None)
    )
    body, once = chat_job(body={"model": away}), {"idempotency-key": "same"}

    def submit(key: dict[str, str], **headers: str) -> httpx.Response:
        return served.client.post("/v1/jobs", json=body, headers={**key, **headers})

    first = submit(tight, **once)
    assert [submit(other).status_code, submit(tight).status_code] == [
        202,
        429,
    ]  # the other's job is not counted
    mine, again = submit(other, **once).json(), submit(tight, **once).json()
    assert first.json()["id"] == again["id"] != mine["id"]
    assert (
        served.client.get(again["urls"]["self"], headers=other).status_code == 200
    )  # seen by the whole tenant
    for job in served.client.get("/v1/jobs", headers=other).json()["data"]:
        served.client.post(job["urls"]["cancel"], headers=other)
