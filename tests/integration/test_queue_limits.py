"""A key's limits hold whatever adds to its queue, and however many add at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from shared.ids import new_id
from shared.jobs import lanes
from shared.jobs.limits import Queued
from shared.keys import tokens
from shared.keys.principal import Limits
from tests.integration.conftest import Served, eventually, new_key

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def nobody(served: Served) -> str:
    """A model that is registered and that no worker serves, so that what is queued stays queued."""
    name = f"nobody-{time.time_ns()}"
    with served.jobs.database.write() as session:
        session.execute(
            text(
                "INSERT INTO models (name, card, tokenizer_files, tokenizer_hash) SELECT :name, "
                "jsonb_set(card, '{name}', to_jsonb(CAST(:name AS text))), tokenizer_files, tokenizer_hash "
                "FROM models WHERE name = 'vdiff-tiny'"
            ),
            {"name": name},
        )
    eventually(
        lambda: name in served.client.get("/v1/models").text, seconds=240, what="the model is known"
    )
    return name


class Key:
    def __init__(self, served: Served, **limits: int) -> None:
        self.tenant = new_id("tenant")
        key = new_key(served.jobs, tenant=self.tenant, **limits)
        self.id = str(tokens.key_id_of(key))
        self.client = httpx.Client(
            base_url=served.url, timeout=600, headers={"Authorization": f"Bearer {key}"}
        )
        self._served = served

    def queued(self) -> tuple[int, int]:
        with self._served.jobs.database.read() as session:
            jobs, size = session.execute(lanes.queued_of(self.tenant, self.id)).one()
        return int(jobs), int(size)

    def upload(self, purpose: str, lines: list[Any]) -> str:
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        answer = self.client.post(
            "/v1/files", data={"purpose": purpose}, files={"file": ("x.jsonl", content)}
        )
        return str(answer.json()["id"])


@pytest.fixture
def key(served: Served) -> Iterator[Key]:
    made = Key(served, max_queued_jobs=8)
    yield made
    made.client.close()


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "What is 1 + 1?"}],
        "max_tokens": 8,
        **more,
    }


def batch_of(key: Key, model: str, lines: int) -> dict[str, Any]:
    body = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": chat(model)}
        for i in range(lines)
    ]
    values = {
        "input_file_id": key.upload("batch", body),
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return dict(key.client.post("/v1/batches", json=values).json())


def test_submissions_at_once_stay_within_the_limit(key: Key, nobody: str) -> None:
    def submit(_: int) -> int:
        body = {"endpoint": "/v1/chat/completions", "body": chat(nobody)}
        return key.client.post("/v1/jobs", json=body).status_code

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(submit, range(16)))
    assert (answers.count(202), answers.count(429)) == (8, 8)
    assert key.queued()[0] == 8


def test_two_batches_at_once_stay_within_the_limit_and_both_get_done(key: Key, nobody: str) -> None:
    """Each fits alone. The lines of the second wait until there is room, however the first is
    ended.
    """
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: batch_of(key, nobody, 6), range(2))

    def look(batch: dict[str, Any]) -> dict[str, Any]:
        return dict(key.client.get(f"/v1/batches/{batch['id']}").json())

    most = 0

    def both_accepted() -> bool:
        nonlocal most
        most = max(most, key.queued()[0])
        states = [look(batch) for batch in (first, second)]
        # A batch that is validated when the other's lines are queued is refused instead: then it is
        # no longer open.
        return (
            all(state["status"] in ("in_progress", "failed") for state in states)
            and key.queued()[0] >= 6
        )

    eventually(both_accepted, seconds=240, what="both batches are accepted")
    for _ in range(10):
        time.sleep(0.3)
        most = max(most, key.queued()[0])
    assert most <= 8
    for batch in (first, second):
        key.client.post(f"/v1/batches/{batch['id']}/cancel")
    for batch in (first, second):
        over = eventually(
            lambda b=batch: (s := look(b))["status"] in ("cancelled", "failed") and s, seconds=240
        )
        if (
            over["status"] == "cancelled"
        ):  # every line is accounted for, those that waited for room included
            assert over["request_counts"]["failed"] == 6
    assert key.queued() == (0, 0)


def test_tokens_of_an_evaluation_are_counted_as_they_are(served: Served, nobody: str) -> None:
    """The first item is short and stands for none of the others."""
    key = Key(served, max_queued_jobs=1_000, max_queued_tokens=3_000)
    long = "What is 1 + 1? " * 20
    lines = [
        {"input": "x" if i == 0 else long, "reference": "2", "mark": time.time_ns()}
        for i in range(60)
    ]
    body = {
        "dataset": {"file_id": key.upload("evals", lines)},
        "template": "{{input}}",
        "graders": [{"type": "exact"}],
        "configurations": [{"name": "a", "model": nobody, "max_tokens": 8}],
    }
    answer = key.client.post("/v1/evaluations", json=body)
    assert answer.status_code == 201, answer.text
    eventually(lambda: key.queued()[1] > 1_500, seconds=240, what="samples are queued")
    for _ in range(5):
        time.sleep(0.5)
        jobs, size = key.queued()
        assert size <= 3_000 and 0 < jobs < 60
    key.client.post(f"/v1/evaluations/{answer.json()['id']}/cancel")
    eventually(lambda: key.queued() == (0, 0), seconds=240, what="the evaluation is cancelled")
    key.client.close()


def test_retries_at_once_stay_within_the_limit(key: Key, nobody: str) -> None:
    ids = []
    for _ in range(2):
        for _ in range(8):
            made = key.client.post(
                "/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": chat(nobody)}
            )
            assert made.status_code == 202, made.text
            ids.append(made.json()["id"])
        for job_id in ids[-8:]:
            key.client.post(f"/v1/jobs/{job_id}/cancel")
    assert key.queued()[0] == 0
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: key.client.post(f"/v1/jobs/{i}/retry").status_code, ids))
    assert answers.count(429) == 8 and key.queued()[0] == 8


def test_what_fits_is_counted_from_the_first_on() -> None:
    assert Queued(Limits(), 0, 0).count_fitting([5] * 3) == 3
    assert Queued(Limits(queued_jobs=10), 8, 0).count_fitting([1] * 5) == 2
    assert Queued(Limits(queued_tokens=10), 0, 3).count_fitting([3, 4, 1]) == 2
    assert Queued(Limits(queued_tokens=10), 0, 30).count_fitting([0, 0]) == 0
