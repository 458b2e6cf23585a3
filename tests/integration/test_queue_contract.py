"""The message that we build by hand against Celery itself: equal to what `apply_async` pushes, and
taken by a worker.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio

from shared.ids import new_id
from shared.jobs.status import JobStatus
from shared.queue.messages import job_message, payload, push, push_sync
from shared.queue.names import GENERATE_TASK, queue_name
from tests.integration.conftest import Jobs, eventually
from worker.app import celery_app

pytestmark = pytest.mark.integration

FRESH = (
    "id",
    "root_id",
    "correlation_id",
    "delivery_tag",
    "reply_to",
    "origin",
    "argsrepr",
)  # differ by design


def known(message: bytes) -> dict[str, Any]:
    """A message as one flat dictionary, its body decoded, without what is new in each."""
    envelope = json.loads(message)
    parts = {
        **{f"header {k}": v for k, v in envelope.pop("headers").items() if k not in FRESH},
        **{f"property {k}": v for k, v in envelope.pop("properties").items() if k not in FRESH},
    }
    return {**parts, **envelope, "body": json.loads(base64.b64decode(envelope["body"]))}


def by_push(jobs: Jobs, job_id: str) -> None:
    async def main() -> None:
        async with redis.asyncio.Redis.from_url(jobs.redis_url) as client:
            await push(client, job_id, model=jobs.model, priority="normal")

    asyncio.run(main())


def by_push_sync(jobs: Jobs, job_id: str) -> None:
    assert push_sync(jobs.redis, [(job_id, jobs.model, "normal")]) == 1


def by_celery(jobs: Jobs, job_id: str) -> None:
    app = celery_app(jobs.redis_url, model=jobs.model)
    with app.connection_for_write() as connection:
        queue = queue_name(jobs.model, "normal")
        app.send_task(
            GENERATE_TASK,
            args=(payload(job_id),),
            queue=queue,
            ignore_result=True,
            connection=connection,
        )
    app.close()


WAYS = [by_push, by_push_sync, by_celery]


def test_the_envelope_is_celerys_own(jobs: Jobs) -> None:
    queue = queue_name(jobs.model, "normal")
    messages = []
    for way in WAYS:
        way(jobs, "job_x")
        message = jobs.redis.rpop(queue)
        assert isinstance(message, bytes)
        messages.append(message)
    ours, ours_sync, celerys = map(known, messages)
    assert ours == ours_sync == celerys
    assert ours["header task"] == GENERATE_TASK
    assert ours["property delivery_info"] == {"exchange": "", "routing_key": queue}
    # The fresh parts are there too, and hang together.
    for message in messages:
        envelope = json.loads(message)
        task_id = envelope["headers"]["id"]
        assert task_id == envelope["headers"]["root_id"] == envelope["properties"]["correlation_id"]
        assert envelope["properties"]["delivery_tag"]
        assert {"reply_to"} <= set(envelope["properties"])
        assert {"origin", "argsrepr"} <= set(envelope["headers"])


def test_the_same_job_twice_is_two_tasks() -> None:
    first, second = (json.loads(job_message("job_x", "q")[1]) for _ in range(2))
    assert first["headers"]["id"] != second["headers"]["id"]
    assert first["properties"]["delivery_tag"] != second["properties"]["delivery_tag"]


def test_the_message_holds_the_id_and_nothing_of_the_prompt(jobs: Jobs) -> None:
    body = known(job_message("job_x", "q")[1])["body"]
    assert body[0] == [{"v": 1, "job_id": "job_x"}]
    assert body[1] == {}


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_takes_it(served_jobs: Jobs, way: Callable[[Jobs, str], None]) -> None:
    job_id = served_jobs.submit(push=0)
    way(served_jobs, job_id)
    assert served_jobs.wait_done(job_id).status == JobStatus.SUCCEEDED
    assert served_jobs.outcomes(job_id) == ["succeeded"]


def test_a_message_of_an_unknown_job_does_no_harm(served_jobs: Jobs) -> None:
    queue = queue_name(served_jobs.model, "normal")
    by_push(served_jobs, new_id("job"))
    served_jobs.redis.lpush(queue, json.dumps({"no": "envelope"}))
    after = served_jobs.submit()
    assert served_jobs.wait_done(after).status == JobStatus.SUCCEEDED
    eventually(lambda: served_jobs.redis.llen(queue) == 0, what="an empty queue")
