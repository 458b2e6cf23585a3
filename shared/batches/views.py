"""The batch object and its items on the wire. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from shared.batches.lines import output_object
from shared.jobs.status import TERMINAL, JobStatus
from shared.jobs.views import LISTED_MESSAGE_MAX
from shared.links import link

MOMENTS = (
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def summary_of(
    by_status: Mapping[str, int],
    prompt_tokens: int,
    completion_tokens: int,
    top_errors: list[dict[str, Any]],
) -> dict[str, Any]:
    """Sum up the ends of the lines. `failed` counts all that have no result, so that the counts add
    up.
    """
    completed = by_status.get(JobStatus.SUCCEEDED.value, 0)
    return {
        "completed": completed,
        "failed": sum(n for status, n in by_status.items() if status in TERMINAL) - completed,
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "top_errors": top_errors,
    }


def outcome_of(summary: Mapping[str, Any], total: int) -> str:
    """In one word, so that nobody takes a batch whose lines all failed for a good one."""
    if summary["completed"] == total:
        return "all_succeeded"
    return "none_succeeded" if summary["completed"] == 0 else "some_failed"


def batch_object(row: Any, by_status: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI's batch object; `outcome`, `top_errors` and `vdiff` are ours.

    Args:
        row: of `batches`.
        by_status: its jobs by status, live; not looked at once the batch is over.
    """
    live = summary_of(by_status, 0, 0, [])
    summary = row.summary or live
    errors = None
    if row.errors is not None:
        errors = {"object": "list", "data": row.errors}
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "model": row.model,
        "errors": errors,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        **{name: _seconds(getattr(row, name)) for name in MOMENTS},
        "request_counts": {
            "total": row.total or 0,
            "completed": summary["completed"],
            "failed": summary["failed"],
        },
        "metadata": row.metadata,
        "usage": summary["usage"] if row.summary else None,
        "outcome": outcome_of(row.summary, row.total) if row.summary and row.total else None,
        "top_errors": summary["top_errors"],
        "vdiff": {"stored": row.stored, "jobs": None if row.summary else dict(by_status)},
    }


def listed_item(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One line in a list: its job's state, and why it has no result. `urls.self` leads to its
    response.
    """
    error = row["error"]
    return {
        "object": "batch.item",
        "line": row["batch_line"],
        "custom_id": row["custom_id"],
        "job_id": row["id"],
        "status": row["status"],
        "attempts": row["attempt"],
        "usage": row["usage"],
        "timing": row["timing"],
        "purged": row["purged_at"] is not None,
        "error": None
        if error is None
        else {"code": error["code"], "message": str(error["message"])[:LISTED_MESSAGE_MAX]},
        "urls": {
            "self": link(f"/v1/batches/{row['batch_id']}/items/{row['batch_line']}"),
            "job": link(f"/v1/jobs/{row['id']}"),
        },
    }


def item_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One line by itself: with its line of the output or error file, once it is over."""
    told: dict[str, Any] = {"response": None, "error": None}
    if row["status"] in TERMINAL and row["purged_at"] is None:
        told = {name: output_object(row)[name] for name in told}
    return {**listed_item(row), **told}
