"""Names of the Celery task and of the queues: one queue per model and priority.

A name is also a Redis key, and model names are free text (`org/model:tag`), so they are
percent-encoded.
"""

from __future__ import annotations

from urllib.parse import quote

from shared.jobs.status import Priority

GENERATE_TASK = "vdiff.generate"
DELIVER_TASK = "vdiff.deliver"
WEBHOOK_QUEUE = "vdiff.webhooks"  # no model is called so: theirs have a priority behind


def queue_name(model: str, priority: str) -> str:
    """The queue of a model's jobs of one priority; the Redis list has the same name."""
    return f"vdiff.{quote(model, safe='')}.{Priority(priority).value}"


def queue_names(model: str) -> list[str]:
    """The queues that a worker of this model reads, served first to last."""
    return [queue_name(model, priority) for priority in Priority]
