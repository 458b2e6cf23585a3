"""The message that says "this job is queued", built and pushed without a Celery connection.

It carries an id and nothing else; the row in PostgreSQL is the job. The API pushes from its event
loop, where `apply_async` costs a third of the throughput, so the envelope is built with Celery's
own `as_task_v2` and kombu's own encoders and pushed with redis-py.
`tests/integration/test_queue_contract.py` holds it against a real worker and against what
`apply_async` itself would push.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import redis
import redis.asyncio
from celery import Celery
from celery.app.amqp import AMQP
from kombu.serialization import dumps
from kombu.transport.virtual.base import Base64

from shared.queue.names import DELIVER_TASK, GENERATE_TASK, WEBHOOK_QUEUE, queue_name

PAYLOAD_VERSION = 1  # what this program writes
OLDEST_PAYLOAD_VERSION = 1  # what it still reads; the one before PAYLOAD_VERSION at least
_ORIGIN = "vdiff"
_PERSISTENT = 2  # AMQP's delivery mode; Redis ignores it, kombu expects it


@lru_cache(maxsize=1)
def _amqp() -> AMQP:
    # An app that never connects: `as_task_v2` wants its configuration, nothing else.
    return AMQP(Celery("vdiff-messages", set_as_current=False, broker="memory://"))


def payload(job_id: str) -> dict[str, Any]:
    """The task's only argument."""
    return {"v": PAYLOAD_VERSION, "job_id": job_id}


def is_readable(content: Any) -> bool:
    """Return whether this program knows the version of a task's argument."""
    version = content.get("v") if isinstance(content, dict) else None
    return isinstance(version, int) and OLDEST_PAYLOAD_VERSION <= version <= PAYLOAD_VERSION


def job_message(job_id: str, queue: str) -> tuple[str, bytes]:
    """The Redis list to LPUSH to, and the message, for one queued job."""
    return queue, task_message(GENERATE_TASK, payload(job_id), job_id, queue)


def read_message(message: bytes) -> str | None:
    """The job's id in a message that `job_message` made, as far as this program can read it."""
    try:
        envelope = json.loads(message)
        (content,), _, _ = json.loads(Base64().decode(envelope["body"]))
        return str(content["job_id"]) if is_readable(content) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def push_deliveries(client: redis.Redis, delivery_ids: Iterable[int]) -> None:
    """Push the messages of webhook deliveries in one round trip."""
    pipe = client.pipeline(transaction=False)
    for delivery_id in delivery_ids:
        content = {"v": PAYLOAD_VERSION, "delivery_id": delivery_id}
        pipe.lpush(
            WEBHOOK_QUEUE, task_message(DELIVER_TASK, content, str(delivery_id), WEBHOOK_QUEUE)
        )
    pipe.execute()


def task_message(task: str, content: dict[str, Any], shown: str, queue: str) -> bytes:
    """Celery's message for a task with one argument.

    The task id is fresh each time: the same job may be pushed twice, and Celery must not take that
    for one task.
    """
    task_id = str(uuid.uuid4())
    message = _amqp().as_task_v2(
        task_id,
        task,
        args=(content,),
        ignore_result=True,
        origin=_ORIGIN,
        argsrepr=repr((shown,)),
        kwargsrepr="{}",
    )
    content_type, content_encoding, body = dumps(message.body, serializer="json")
    envelope = {
        "body": Base64().encode(body),
        "content-encoding": content_encoding,
        "content-type": content_type,
        "headers": message.headers,
        "properties": {
            **message.properties,
            "delivery_mode": _PERSISTENT,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    return json.dumps(envelope).encode()


async def push(client: redis.asyncio.Redis, job_id: str, *, model: str, priority: str) -> None:
    """Push one job's message; call it after the row is committed."""
    key, message = job_message(job_id, queue_name(model, priority))
    await client.lpush(key, message)


def push_sync(client: redis.Redis, jobs: Iterable[tuple[str, str, str]]) -> int:
    """Push the messages of (job_id, model, priority) in one round trip; says how many."""
    pipe = client.pipeline(transaction=False)
    count = 0
    for job_id, model, priority in jobs:
        key, message = job_message(job_id, queue_name(model, priority))
        pipe.lpush(key, message)
        count += 1
    if count:
        pipe.execute()
    return count
