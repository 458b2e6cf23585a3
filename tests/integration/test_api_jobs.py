"""Native jobs over real HTTP: submit, poll, wait, list, follow, cancel; API, worker, PostgreSQL and
Redis are real.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from shared.db.session import sync_engine_unpooled
from shared.ids import new_id
from tests.integration.conftest import Served, eventually, metric, new_key

pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
CHAT = "/v1/chat/completions"


def chat_job(**more: Any) -> dict[str, Any]:
    body = {"model": "vdiff-tiny", "messages": QUESTION, "max_tokens": 16, **more.pop("body", {})}
    return {"endpoint": CHAT, "body": body, **more}


def long_job(**more: Any) -> dict[str, Any]:
    """Runs for seconds: one token a step, no early end."""
    return chat_job(
        body={"max_tokens": 480, "ignore_eos": True, "diffusion": {"block_length": 480}}, **more
    )


def test_submit_then_poll(served: Served) -> None:
    answer = served.client.post("/v1/jobs", json=chat_job(custom_id="c-1", metadata={"team": "x"}))
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["x-job-id"] == job["id"]
    assert int(answer.headers["retry-after"]) <= 120
    assert answer.headers["x-request-id"]
    assert (job["object"], job["custom_id"], job["metadata"], job["priority"]) == (
        "job",
        "c-1",
        {"team": "x"},
        "normal",
    )

    def done() -> Any:
        shown = served.client.get(job["urls"]["self"]).json()
        return shown if shown["done"] else None

    job = eventually(done)
    assert job["status"] == "succeeded"
    assert job["result"]["choices"][0]["message"]["content"] == "42"
    assert job["attempts"] == 1
    assert job["usage"]["completion_tokens"] == 2
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job["timing"]["total_ms"] >= job["timing"]["denoise_ms"] > 0
    assert job["diffusion"]["algorithm"] == "low_confidence"
    assert "threshold" not in job["diffusion"]  # low_confidence has none
    assert served.client.get(job["urls"]["result"]).json() == job["result"]
    attempts = served.client.get(job["urls"]["attempts"]).json()["data"]
    assert [a["outcome"] for a in attempts] == ["succeeded"]


def test_wait_answers_when_the_job_is_done(served: Served) -> None:
    job = served.client.post("/v1/jobs", json=chat_job()).json()
    waited = served.client.get(f"/v1/jobs/{job['id']}", params={"wait": 30})
    assert waited.json()["status"] == "succeeded"
    again = served.client.get(
        f"/v1/jobs/{job['id']}", headers={"if-none-match": waited.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    other = served.client.get(f"/v1/jobs/{job['id']}", headers={"if-none-match": '"other"'})
    assert other.status_code == 200


def test_prefer_wait(served: Served) -> None:
    answer = served.client.post(
        "/v1/jobs", json=chat_job(), headers={"prefer": "respond-async, wait=30"}
    )
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=30"
    assert answer.json()["result"]["choices"][0]["message"]["content"] == "42"
    late = served.client.post("/v1/jobs", json=long_job(), headers={"prefer": "wait=0"})
    assert (late.status_code, late.json()["result"]) == (202, None)
    served.client.post(f"/v1/jobs/{late.json()['id']}/cancel")


def test_the_seed_is_frozen_and_reported(served: Served) -> None:
    hot = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    first = served.client.post(
        "/v1/jobs", json=chat_job(body=hot), headers={"prefer": "wait=30"}
    ).json()
    seed = first["result"]["vdiff"]["seed"]
    second = served.client.post(
        "/v1/jobs", json=chat_job(body={**hot, "seed": seed}), headers={"prefer": "wait=30"}
    ).json()
    assert second["result"]["choices"] == first["result"]["choices"]


def test_list_pages_and_filters(served: Served) -> None:
    tag = f"list-{time.time_ns()}"
    ids = [
        served.client.post("/v1/jobs", json=chat_job(metadata={"tag": tag})).json()["id"]
        for _ in range(5)
    ]
    for job_id in ids:
        served.client.get(f"/v1/jobs/{job_id}", params={"wait": 30})
    seen: list[str] = []
    params: dict[str, Any] = {"metadata[tag]": tag, "limit": 2}
    while True:
        page = served.client.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == ids[::-1]
    one = {"metadata[tag]": tag, "status": "succeeded", "model": "vdiff-tiny", "created_after": 0}
    assert len(served.client.get("/v1/jobs", params=one).json()["data"]) == 5
    assert served.client.get("/v1/jobs", params={**one, "status": "failed"}).json()["data"] == []
    assert (
        served.client.get("/v1/jobs", params={**one, "created_after": "2999-01-01"}).json()["data"]
        == []
    )
    for bad in (
        {"limit": 0},
        {"limit": "x"},
        {"status": "odd"},
        {"cursor": "%"},
        {"created_after": "soon"},
        {"sort": "x"},
    ):
        answer = served.client.get("/v1/jobs", params=bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(bad)))


def sse(lines: Any) -> list[tuple[str, str, Any]]:
    events, current = [], {}
    for line in lines:
        if line == "" and "data" in current:
            events.append((current.get("id", ""), current["event"], json.loads(current["data"])))
            current = {}
        elif ": " in line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            current[name] = value
    return events


def follow(served: Served, job_id: str, **headers: str) -> list[tuple[str, str, Any]]:
    with served.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return sse(answer.iter_lines())


def test_events_tell_the_whole_story_and_resume(served: Served) -> None:
    job = served.client.post("/v1/jobs", json=chat_job()).json()
    events = follow(served, job["id"])
    kinds = [kind for _, kind, _ in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "done"
    assert {"progress", "denoise"} <= set(kinds)
    text = "".join(data["text"] for _, kind, data in events if kind == "progress")
    done = events[-1][2]
    assert text == done["result"]["choices"][0]["message"]["content"] == "42"
    denoised = sorted(p for _, kind, data in events if kind == "denoise" for p in data["positions"])
    assert len(denoised) == len(set(denoised))  # no position twice
    steps = served.client.get(f"/v1/jobs/{job['id']}/steps").json()  # the same, kept with the job
    told = [data for _, kind, data in events if kind == "denoise"]
    kept = steps["answers"][0]["steps"]
    for name in ("step", "positions", "tokens", "texts"):
        assert [s[name] for s in kept] == [data[name] for data in told]
    assert served.client.get(f"/v1/jobs/{new_id('job')}/steps").status_code == 404
    middle = len(events) // 2
    rest = follow(served, job["id"], **{"last-event-id": events[middle][0]})
    assert rest == events[middle + 1 :]
    assert [
        kind for _, kind, _ in follow(served, job["id"], **{"last-event-id": events[-1][0]})
    ] == ["done"]
    for last in ("x", "99999999999999999999-0", "1-"):
        bad = served.client.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": last})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_cancel_running_and_queued(served: Served) -> None:
    running = served.client.post("/v1/jobs", json=long_job()).json()
    eventually(lambda: served.client.get(running["urls"]["self"]).json()["status"] == "running")
    assert served.client.post(running["urls"]["cancel"]).status_code in (200, 202)
    job = served.client.get(running["urls"]["self"], params={"wait": 30}).json()
    assert (job["status"], job["error"]["code"]) == ("cancelled", "cancelled")
    result = served.client.get(job["urls"]["result"])
    assert (result.status_code, result.json()["error"]["code"]) == (409, "cancelled")
    again = served.client.post(running["urls"]["cancel"])
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


def test_result_of_an_unfinished_job_is_a_conflict(served: Served) -> None:
    job = served.client.post("/v1/jobs", json=long_job()).json()
    answer = served.client.get(job["urls"]["result"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_done")
    served.client.post(job["urls"]["cancel"])


def test_idempotency(served: Served) -> None:
    key = {"idempotency-key": f"k-{time.time_ns()}"}
    first = served.client.post("/v1/jobs", json=chat_job(), headers=key).json()
    again = served.client.post("/v1/jobs", json=chat_job(), headers=key)
    assert again.json()["id"] == first["id"]
    other = served.client.post("/v1/jobs", json=chat_job(custom_id="other"), headers=key)
    assert (other.status_code, other.json()["error"]["param"]) == (422, "Idempotency-Key")
    long_key = served.client.post(
        "/v1/jobs", json=chat_job(), headers={"idempotency-key": "k" * 256}
    )
    assert (long_key.status_code, long_key.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_an_automatic_retry_of_the_sdk_does_not_pay_twice(served: Served) -> None:
    body = chat_job(metadata={"once": str(time.time_ns())})
    first = served.client.post(
        "/v1/jobs", json=body, headers={"x-stainless-retry-count": "0"}
    ).json()
    retry = served.client.post(
        "/v1/jobs", json=body, headers={"x-stainless-retry-count": "1"}
    ).json()
    fresh = served.client.post("/v1/jobs", json=body).json()
    assert retry["id"] == first["id"] != fresh["id"]


def test_health_version_models_and_metrics(served: Served) -> None:
    assert served.client.get("/health/live").json() == {"status": "ok"}
    health = served.client.get("/health").json()
    assert (health["status"], health["database"], health["redis"], health["workers"]) == (
        "ok",
        "ok",
        "ok",
        1,
    )
    assert served.client.get("/version").json()["version"]
    assert "vdiff" in served.client.get("/docs").text
    models = served.client.get("/v1/models").json()["data"]
    assert models[0]["id"] == "vdiff-tiny"
    assert (models[0]["family"], models[0]["workers"], models[0]["context_length"]) == (
        "llada",
        1,
        512,
    )
    assert served.client.get("/v1/models/vdiff-tiny").json() == models[0]
    assert served.client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


def test_a_model_that_is_only_away_queues(served: Served) -> None:
    from shared import serving
    from shared.model_card import ModelCard

    jobs = served.jobs
    with jobs.database.write() as session:
        row = session.execute(serving.get_model("vdiff-tiny")).one()
        card = ModelCard.from_json({**row.card, "name": "away"})
        session.execute(serving.register_model(card, row.tokenizer_files))
    time.sleep(1.1)  # what the API trusts a list of models for
    job = served.client.post("/v1/jobs", json=chat_job(body={"model": "away"}))
    assert (job.status_code, job.json()["status"], job.json()["queue_position"]) == (
        202,
        "queued",
        1,
    )
    second = served.client.post("/v1/jobs", json=chat_job(body={"model": "away"})).json()
    assert second["queue_position"] == 2
    assert metric(served, "vdiff_queue_depth", model="away", priority="normal") == 2
    cancelled = served.client.post(job.json()["urls"]["cancel"])
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    served.client.post(second["urls"]["cancel"])


def test_head_and_unknown_paths_have_the_one_error_body(served: Served) -> None:
    missing = served.client.get("/v1/nothing")
    wrong = served.client.put("/v1/jobs")
    assert [missing.status_code, wrong.status_code] == [404, 405]
    for answer in (missing, wrong):
        assert answer.headers["content-type"] == "application/problem+json"
        body = answer.json()
        assert {"type", "title", "status", "detail", "instance", "error"} <= set(body)
        assert {"message", "type", "param", "code"} == set(body["error"])
    assert isinstance(wrong, httpx.Response)
    assert "POST" in wrong.headers["allow"] or "GET" in wrong.headers["allow"]


def test_pages_hold_still_while_jobs_come_in(served: Served) -> None:
    tag = f"keyset-{time.time_ns()}"

    def add() -> str:
        job_id: str = served.client.post("/v1/jobs", json=chat_job(metadata={"tag": tag})).json()[
            "id"
        ]
        return job_id

    before = [add() for _ in range(6)]
    seen: list[str] = []
    params: dict[str, Any] = {"metadata[tag]": tag, "limit": 2}
    for _ in range(10):
        page = served.client.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        add()  # newer than the page: it neither shifts nor repeats the rest
        add()
        if not page["has_more"]:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == before[::-1]


def test_a_reader_that_was_cut_off_misses_nothing(served: Served) -> None:
    """Reads a running job's events in pieces, each time from the last id it saw."""
    job = served.client.post(
        "/v1/jobs", json=chat_job(body={"max_tokens": 128, "ignore_eos": True})
    ).json()
    pieces: list[tuple[str, str, Any]] = []
    last: dict[str, str] = {}
    for _ in range(200):
        with served.client.stream("GET", f"/v1/jobs/{job['id']}/events", headers=last) as answer:
            lines: list[str] = []
            for line in answer.iter_lines():
                lines.append(line)
                if line == "" and len(sse(lines)) >= 20:
                    break  # cut off in the middle
        pieces += sse(lines)
        last = {"last-event-id": pieces[-1][0]}
        if pieces[-1][1] == "done":
            break
    assert pieces == follow(served, job["id"])
    text = "".join(data["text"] for _, kind, data in pieces if kind == "progress")
    assert text == pieces[-1][2]["result"]["choices"][0]["message"]["content"]


def test_an_etag_changes_with_the_job(served: Served) -> None:
    job = served.client.post("/v1/jobs", json=long_job()).json()
    running = served.client.get(job["urls"]["self"])
    served.client.post(job["urls"]["cancel"])
    over = served.client.get(
        job["urls"]["self"], params={"wait": 30}, headers={"if-none-match": running.headers["etag"]}
    )
    assert (over.status_code, over.json()["status"]) == (200, "cancelled")
    assert over.headers["etag"] != running.headers["etag"]
    assert "retry-after" in running.headers
    assert "retry-after" not in over.headers


@contextmanager
def database_away(served: Served, postgres_url: str) -> Iterator[None]:
    """PostgreSQL takes no connection to the database, and has cut those that there were."""
    name = make_url(served.jobs.database_url).database
    engine = sync_engine_unpooled(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'))
        try:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            connection.execute(text(cut), {"name": name})
            yield
        finally:
            connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))


def test_who_waits_goes_on_waiting_while_the_database_is_away(
    served: Served, postgres_url: str
) -> None:
    """A restart of PostgreSQL ends no wait: the job is stored, and who is told so pays for it once."""
    admin = {"authorization": f"Bearer {new_key(served.jobs, scopes=['admin'])}"}
    assert "\nvdiff_database_up 1.0\n" in served.client.get("/metrics", headers=admin).text
    served.worker.signal(signal.SIGSTOP)
    tag = f"away-{time.time_ns()}"
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(
                served.client.post,
                "/v1/jobs",
                json=chat_job(metadata={"tag": tag}),
                headers={"prefer": "wait=40"},
            )
            listed = {"metadata[tag]": tag}
            eventually(
                lambda: served.client.get("/v1/jobs", params=listed).json()["data"], what="accepted"
            )
            with database_away(served, postgres_url):
                eventually(
                    lambda: served.client.get("/v1/jobs").status_code == 503,
                    what="the database is away",
                )
                # What scrapes still hears this process, also with a key that was known.
                for headers in ({}, admin):
                    scrape = served.client.get("/metrics", headers=headers)
                    assert scrape.status_code == 200 and "\nvdiff_database_up 0.0\n" in scrape.text
                    assert (
                        "vdiff_requests_total" in scrape.text and "vdiff_jobs{" not in scrape.text
                    )
                time.sleep(2.0)  # longer than a wait goes without reading the row
            served.worker.signal(signal.SIGCONT)
            answer = waiting.result(60)
    finally:
        served.worker.signal(signal.SIGCONT)
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
