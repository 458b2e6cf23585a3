"""A job's row as the wire shows it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from shared.jobs.status import TERMINAL, JobStatus
from shared.sampling_params import shown_diffusion


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def urls(job_id: str) -> dict[str, str]:
    """Paths, so that they hold behind any proxy."""
    own = f"/v1/jobs/{job_id}"
    return {
        "self": own,
        "events": f"{own}/events",
        "result": f"{own}/result",
        "attempts": f"{own}/attempts",
        "cancel": f"{own}/cancel",
    }


def job_object(
    row: Mapping[Any, Any], *, queue_position: int | None = None, eta_seconds: float | None = None
) -> dict[str, Any]:
    """The job object. Times are Unix seconds, durations milliseconds.

    Args:
        row: the columns of `shared.jobs.queries.PUBLIC`.
        queue_position: 1 is next; None when it does not wait.
    """
    done = row["status"] in TERMINAL
    diffusion = row["diffusion"]
    if diffusion is None:
        diffusion = shown_diffusion(row["params"])
    return {
        "id": row["id"],
        "object": "job",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "status": row["status"],
        "done": done,
        "priority": row["priority"],
        "custom_id": row["custom_id"],
        "metadata": row["metadata"],
        "created_at": _seconds(row["created_at"]),
        "started_at": _seconds(row["started_at"]),
        "finished_at": _seconds(row["finished_at"]),
        "attempts": row["attempt"],
        "cancel_requested": row["cancel_requested"],
        "queue_position": queue_position if row["status"] == JobStatus.QUEUED else None,
        "eta_seconds": None if done else eta_seconds,
        "progress": row["progress"],
        "result": row["result"],
        "error": row["error"],
        "usage": row["usage"],
        "timing": row["timing"],
        "diffusion": diffusion,
        "urls": urls(row["id"]),
        "webhook": None,
    }


def attempt_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One execution of a job."""
    return {
        "object": "job.attempt",
        "attempt": row["attempt"],
        "worker_id": row["worker_id"],
        "outcome": row["outcome"],
        "started_at": _seconds(row["started_at"]),
        "ended_at": _seconds(row["ended_at"]),
        "error": row["error"],
    }
