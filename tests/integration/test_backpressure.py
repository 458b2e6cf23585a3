"""Sync requests beyond a limit wait inside the request; clients that leave, and SDKs that come
back. Over real HTTP.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shared import serving
from shared.events import left_key
from shared.model_card import ModelCard
from tests.integration.conftest import ApiProcess, Served, eventually, metric, new_key
from tests.integration.test_api_jobs import CHAT, QUESTION, chat_job
from tests.integration.test_api_keys import auth

pytestmark = pytest.mark.integration

AWAY = "backpressure-away"
ASK: dict[str, Any] = {"model": "vdiff-tiny", "messages": QUESTION, "max_tokens": 16}
LONG: dict[str, Any] = {
    **ASK,
    "max_tokens": 480,
    "ignore_eos": True,
    "diffusion": {"block_length": 480},
}


@pytest.fixture(scope="module", autouse=True)
def away(served: Served) -> None:
    """A model without a worker, whose jobs fill a limit for as long as one likes."""
    with served.jobs.database.write() as session:
        row = session.execute(serving.get_model("vdiff-tiny")).one()
        card = ModelCard.from_json({**row.card, "name": AWAY})
        session.execute(serving.register_model(card, row.tokenizer_files))


def full_key(served: Served) -> tuple[dict[str, str], str]:
    """A key that has queued all that it may, and the job that takes up its room."""
    key = auth(new_key(served.jobs, max_queued_jobs=1))
    blocker = eventually(
        lambda: (
            (
                a := served.client.post(
                    "/v1/jobs", json=chat_job(body={"model": AWAY}), headers=key
                )
            ).status_code
            == 202
            and a.json()
        )
    )
    return key, blocker["id"]


def waiting(served: Served) -> float:
    text = served.client.get("/metrics").text
    return float(
        next(
            line for line in text.splitlines() if line.startswith("vdiff_requests_waiting ")
        ).split()[1]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_beyond_the_depth_waits_for_room(served: Served, stream: bool) -> None:
    key, blocker = full_key(served)
    native = served.client.post("/v1/jobs", json=chat_job(), headers=key)
    assert native.status_code == 429  # who can come back for its job is told at once
    answers: list[httpx.Response] = []
    body = {**ASK, "stream": stream}
    thread = threading.Thread(
        target=lambda: answers.append(served.client.post(CHAT, json=body, headers=key))
    )
    thread.start()
    eventually(lambda: waiting(served) == 1, what="the request waits")
    assert answers == []
    served.client.post(f"/v1/jobs/{blocker}/cancel", headers=key)
    thread.join(30)
    assert answers[0].status_code == 200
    assert answers[0].headers["x-job-id"].startswith("job_")
    assert "42" in answers[0].text if not stream else answers[0].text.endswith("data: [DONE]\n\n")
    assert waiting(served) == 0


def test_patience_ends_with_429(served: Served) -> None:
    key, blocker = full_key(served)
    refused = served.client.post(CHAT, json=ASK, headers={**key, "x-stainless-read-timeout": "1.3"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert "x-job-id" not in refused.headers
    served.client.post(f"/v1/jobs/{blocker}/cancel", headers=key)


def test_the_limit_of_requests_waits_too(served: Served) -> None:
    key = auth(new_key(served.jobs, requests_per_minute=1))
    assert (
        served.client.post(CHAT, json=ASK, headers=key).headers["x-ratelimit-remaining-requests"]
        == "0"
    )
    began = time.monotonic()
    refused = served.client.post(CHAT, json=ASK, headers={**key, "x-stainless-read-timeout": "1.5"})
    assert refused.status_code == 429
    assert time.monotonic() - began > 0.4  # it did wait
    assert refused.headers["x-ratelimit-limit-requests"] == "1"
    assert served.client.get("/v1/jobs", headers=key).status_code == 429  # others do not


def test_who_leaves_while_waiting_leaves_nothing_behind(served: Served) -> None:
    key, blocker = full_key(served)
    tag = f"left-{time.time_ns()}"
    with (
        pytest.raises(httpx.TimeoutException),
        httpx.Client(base_url=served.url, timeout=0.5) as client,
    ):
        client.post(CHAT, json={**ASK, "metadata": {"tag": tag}}, headers=key)
    eventually(lambda: waiting(served) == 0, what="its place is free")
    served.client.post(f"/v1/jobs/{blocker}/cancel", headers=key)
    answer = served.client.post(
        CHAT, json=ASK, headers=key
    )  # comes after whoever would still be in the line
    assert answer.status_code == 200
    assert (
        served.client.get("/v1/jobs", params={"metadata[tag]": tag}, headers=key).json()["data"]
        == []
    )


def jobs_tagged(served: Served, tag: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = served.client.get(
        "/v1/jobs", params={"metadata[tag]": tag}
    ).json()["data"]
    return data


def test_an_sdk_that_times_out_comes_back_to_its_job(served: Served) -> None:
    """The openai client gives up, and sends the same request again within a second."""
    tag = f"again-{time.time_ns()}"
    body = {**LONG, "max_tokens": 128, "diffusion": {"block_length": 128}, "metadata": {"tag": tag}}
    with (
        httpx.Client(base_url=served.url, timeout=0.3) as hasty,
        pytest.raises(httpx.TimeoutException),
    ):
        hasty.post(CHAT, json=body, headers={"x-stainless-retry-count": "0"})
    answer = served.client.post(CHAT, json=body, headers={"x-stainless-retry-count": "1"})
    assert answer.status_code == 200
    assert [(job["id"], job["status"]) for job in jobs_tagged(served, tag)] == [
        (answer.json()["vdiff"]["job_id"], "succeeded")
    ]
    mark = left_key(answer.json()["vdiff"]["job_id"])
    eventually(
        lambda: not served.jobs.redis.exists(mark), what="no mark of who left stays in Redis"
    )


def test_an_sdk_that_gives_up_for_good_cancels(served: Served) -> None:
    tag = f"gave-up-{time.time_ns()}"
    before = metric(served, "vdiff_attempts_total", outcome="cancelled")
    with (
        openai.OpenAI(
            base_url=f"{served.url}/v1", api_key="x", max_retries=1, timeout=0.3
        ) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(
            **{k: v for k, v in LONG.items() if k in ("model", "messages", "max_tokens")},
            metadata={"tag": tag},
            n=8,
            extra_body={"ignore_eos": True, "diffusion": {"block_length": 480}},
        )
    eventually(
        lambda: [j["status"] for j in jobs_tagged(served, tag)] == ["cancelled"],
        what="cancelled, and only one",
    )
    eventually(
        lambda: metric(served, "vdiff_attempts_total", outcome="cancelled") > before, what="counted"
    )


@pytest.fixture
def second(served: Served, tmp_path: Path) -> Iterator[httpx.Client]:
    """Another API process of the same installation."""
    api = ApiProcess(served.jobs, tmp_path / "second.log")
    try:
        api.wait_ready()
        with httpx.Client(base_url=api.url, timeout=60) as client:
            yield client
    finally:
        api.end()


def test_who_leaves_cancels_nothing_that_somebody_waits_for_elsewhere(
    served: Served, second: httpx.Client
) -> None:
    """Three jobs whose client leaves the first process: at the other a request waits for one,
    somebody follows one.
    """
    tags = [f"elsewhere-{n}-{time.time_ns()}" for n in range(3)]
    bodies = [{**ASK, "temperature": 0, "metadata": {"tag": tag}} for tag in tags]
    answers: list[httpx.Response] = []
    events: list[str] = []

    def follow(job_id: str) -> None:
        with second.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            events.extend(line for line in stream.iter_lines() if line.startswith("event: "))

    served.worker.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(5) as pool:
            hasty = httpx.Client(base_url=served.url, timeout=3.0)
            left = [pool.submit(hasty.post, CHAT, json=body) for body in bodies]
            ids = [
                eventually(
                    lambda tag=tag: [job["id"] for job in jobs_tagged(served, tag)], what="accepted"
                )[0]
                for tag in tags
            ]
            retry = {"x-stainless-retry-count": "1"}
            waits = pool.submit(
                lambda: answers.append(second.post(CHAT, json=bodies[0], headers=retry))
            )
            follows = pool.submit(follow, ids[1])
            for one in left:
                assert isinstance(one.exception(30), httpx.TimeoutException)
            eventually(
                lambda: served.client.get(f"/v1/jobs/{ids[2]}").json()["status"] == "cancelled",
                what="of nobody",
            )
            time.sleep(1.0)  # what is still to be cancelled had its time
            assert [
                served.client.get(f"/v1/jobs/{job_id}").json()["status"] for job_id in ids[:2]
            ] == [
                "queued",
                "queued",
            ]
            served.worker.signal(signal.SIGCONT)
            waits.result(60)
            follows.result(60)
    finally:
        served.worker.signal(signal.SIGCONT)
    assert (answers[0].status_code, answers[0].json()["vdiff"]["job_id"]) == (200, ids[0])
    assert (
        events[-1] == "event: done"
        and served.client.get(f"/v1/jobs/{ids[1]}").json()["status"] == "succeeded"
    )


def test_a_retry_takes_no_other_calls_sample(served: Served) -> None:
    """Parallel calls that draw are the same request and want an answer each; one that draws nothing
    may have any.
    """
    drawn = {**ASK, "temperature": 1.0, "metadata": {"tag": f"drawn-{time.time_ns()}"}}
    retry = {"x-stainless-retry-count": "1"}
    made = [
        served.client.post(CHAT, json=drawn, headers={"x-stainless-retry-count": n})
        for n in ("0", "0", "1")
    ]
    assert len({answer.json()["vdiff"]["job_id"] for answer in made}) == 3
    seeded = {**drawn, "seed": 7}
    first = served.client.post(CHAT, json=seeded).json()["vdiff"]["job_id"]
    assert served.client.post(CHAT, json=seeded, headers=retry).json()["vdiff"]["job_id"] == first
