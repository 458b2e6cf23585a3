"""A job's row as the wire shows it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from shared.diffusion_params import shown_diffusion
from shared.jobs.status import TERMINAL, JobStatus
from shared.links import link

LISTED_MESSAGE_MAX = 500  # characters of an error in a list


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def urls(job_id: str) -> dict[str, str]:
    """Return the job's URLs: paths, so that they hold behind any proxy."""
    own = link(f"/v1/jobs/{job_id}")
    return {
        "self": own,
        "events": f"{own}/events",
        "result": f"{own}/result",
        "attempts": f"{own}/attempts",
        "cancel": f"{own}/cancel",
        "retry": f"{own}/retry",
        "replay": f"{own}/replay",
    }


def deadlines_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "start_by": _seconds(row["start_by"]),
        "complete_by": _seconds(row["complete_by"]),
        "max_run_seconds": row["max_run_seconds"],
        "retain_for": row["retain_seconds"],
    }


def replay_object(
    row: Mapping[Any, Any], original: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the comparison of a replay with the job that it repeats.

    Args:
        original: that job's result; None when it was purged.
    """
    if row["replay_of"] is None:
        return None
    compared: dict[str, Any] = {"of": row["replay_of"], "same_text": None, "first_difference": None}
    if row["result"] is None or original is None:
        return compared
    difference = first_difference(original, row["result"])
    return {**compared, "same_text": difference is None, "first_difference": difference}


def _texts(result: Mapping[str, Any]) -> list[str]:
    if "data" in result:  # scores: the last bits depend on who else was in the batch
        return [f"{score['loglikelihood']:.4f}" for score in result["data"]]
    if "output" in result:
        return [part["text"] for item in result["output"] for part in item["content"]]
    return [
        c["message"]["content"] if "message" in c else c.get("text", "")
        for c in result.get("choices", ())
    ]


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return where two results' texts part: choice, character, and a little of both from there."""
    old, new = _texts(before), _texts(after)
    for index in range(max(len(old), len(new))):
        one, other = (texts[index] if index < len(texts) else "" for texts in (old, new))
        if one != other:
            at = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
            return {
                "choice": index,
                "position": at,
                "before": one[at : at + 40],
                "after": other[at : at + 40],
            }
    return None


def job_object(
    row: Mapping[Any, Any],
    *,
    queue_position: int | None = None,
    eta_seconds: float | None = None,
    eta_range_seconds: Sequence[float] | None = None,
    original: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The job object. Times are Unix seconds, durations milliseconds.

    Args:
        row: the columns of `shared.jobs.queries.PUBLIC`.
        queue_position: 1 is next; None when it does not wait.
        original: of a replay, the result that it is compared with.
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
        "batch_id": row["batch_id"],
        "metadata": row["metadata"],
        "created_at": _seconds(row["created_at"]),
        "started_at": _seconds(row["started_at"]),
        "finished_at": _seconds(row["finished_at"]),
        "attempts": row["attempt"],
        "losses": row["losses"],
        "isolated": row["isolation"] is not None and not done,
        "life": row["life"],
        "cancel_requested": row["cancel_requested"],
        "queue_position": queue_position if row["status"] == JobStatus.QUEUED else None,
        "eta_seconds": None if done else eta_seconds,
        "eta_range_seconds": None if done else eta_range_seconds,
        "progress": row["progress"],
        "result": row["result"],
        "error": row["error"],
        "usage": row["usage"],
        "timing": row["timing"],
        "diffusion": diffusion,
        "deadlines": deadlines_object(row),
        "replay": replay_object(row, original),
        "purged_at": _seconds(row["purged_at"]),
        "urls": urls(row["id"]),
        "webhook": webhook_object(row["webhook"]),
    }


def listed_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The job object of a list: without `result`, which `urls.result` leads to.

    Args:
        row: the columns of `shared.jobs.queries.LISTED`.
    """
    shown = job_object({**row, "result": None, "params": {}})
    del shown["result"]
    error = shown["error"]
    if error is not None:
        shown["error"] = {**error, "message": str(error.get("message", ""))[:LISTED_MESSAGE_MAX]}
    return {**shown, "diffusion": row["diffusion"]}


def webhook_object(webhook: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if webhook is None else {k: v for k, v in webhook.items() if k != "key_id"}


def attempt_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One execution of a job."""
    return {
        "object": "job.attempt",
        "attempt": row["attempt"],
        "life": row["life"],
        "worker_id": row["worker_id"],
        "outcome": row["outcome"],
        "alone": row["alone"],
        "started_at": _seconds(row["started_at"]),
        "ended_at": _seconds(row["ended_at"]),
        "error": row["error"],
    }
