"""Event types, the body of an event, and its signed headers: Standard Webhooks. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from standardwebhooks import Webhook

from shared.errors import InvalidParameter
from shared.jobs.status import TERMINAL, JobStatus
from shared.links import link

TYPES = {
    "job.queued": "a job was accepted, retried or went back to the queue",
    "job.started": "a worker began an attempt",
    "job.succeeded": "the job is done, its result can be read",
    "job.failed": "the job failed for good",
    "job.cancelled": "the job was cancelled",
    "job.expired": "a deadline of the job passed",
    "batch.completed": "every line of the batch ended, whatever became of it",
    "batch.failed": "the batch was refused, or its file was lost",
    "batch.cancelled": "the batch was cancelled",
    "batch.expired": "the batch's completion window ended first",
}
JOB_TYPES = tuple(kind for kind in TYPES if kind.startswith("job."))
TEST_TYPE = "webhook.test"
DEFAULT_TYPES = [f"job.{s.value}" for s in JobStatus if s in TERMINAL]
INLINE_MAX_BYTES = 16_384


def event_types(value: Any, param: str, known: Collection[str] = tuple(TYPES)) -> list[str]:
    """A list of event types. Raises InvalidParameter."""
    if not isinstance(value, list) or not value or any(v not in known for v in value):
        raise InvalidParameter(f"{param} must be a list of some of {', '.join(known)}", param=param)
    return list(dict.fromkeys(value))


def event_body(event: Mapping[Any, Any], result: Mapping[str, Any] | None = None) -> bytes:
    """Return the body of an event, the same for every attempt.

    Args:
        event: the columns of `webhook_events`.
        result: the job's result, to be inlined if it is no larger than 16 kB.
    """
    created: datetime = event["created_at"]
    data: dict[str, Any] = {
        "id": event["job_id"] or event["batch_id"],
        "status": event["status"],
        "sequence": event["sequence"],
    }
    if event["job_id"] is not None:
        data["result_url"] = link(f"/v1/jobs/{event['job_id']}/result")
    elif event["batch_id"] is not None:
        data["result_url"] = link(f"/v1/batches/{event['batch_id']}")
    if (
        result is not None
        and len(json.dumps(result, ensure_ascii=False).encode()) <= INLINE_MAX_BYTES
    ):
        data["result"] = result
    body = {
        "id": event["id"],
        "object": "event",
        "type": event["type"],
        "created_at": int(created.timestamp()),
        "timestamp": created.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "data": data,
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def signed_headers(
    event_id: str, body: bytes, secrets: Sequence[str], *, now: datetime
) -> dict[str, str]:
    """The headers of one attempt; several secrets while one is being replaced."""
    text = body.decode()
    signatures = [Webhook(secret).sign(event_id, now, text) for secret in secrets]
    return {
        "content-type": "application/json",
        "user-agent": "vdiff-webhooks/1",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
