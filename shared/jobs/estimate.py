"""When a job may be done: an estimate from what the model's live workers measured. None where nothing was measured yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shared import serving
from shared.db.session import AsyncReadSession
from shared.jobs.status import JobStatus


def running_eta(progress: Mapping[str, Any] | None, elapsed_seconds: float) -> float | None:
    """By the tokens committed so far, at the same pace."""
    if not progress or not progress.get("tokens_committed"):
        return None
    left: float = progress["tokens_total"] - progress["tokens_committed"]
    seconds: float = max(0.0, elapsed_seconds * left / progress["tokens_committed"])
    return round(seconds, 1)


def queued_eta(position: int, workers: Sequence[Mapping[Any, Any]]) -> float | None:
    """`position` jobs, the workers' mean seconds per job, `slots` at a time.

    Args:
        position: 1 is next.
        workers: {slots, stats} each; stats has `job_ms` and `jobs_succeeded`.
    """
    slots = sum(w["slots"] for w in workers)
    finished = sum(w["stats"].get("jobs_succeeded", 0) for w in workers)
    if not slots or not finished:
        return None
    mean_seconds: float = sum(w["stats"].get("job_ms", 0) for w in workers) / finished / 1000
    seconds: float = mean_seconds * (1 + (position - 1) / slots)
    return round(seconds, 1)


async def eta_seconds(
    session: AsyncReadSession, row: Mapping[Any, Any], position: int | None, stale_seconds: float
) -> float | None:
    """Of a job that is not over."""
    if row["status"] == JobStatus.RUNNING:
        return running_eta(row["progress"], (datetime.now(UTC) - row["started_at"]).total_seconds())
    if position is None:
        return None
    live = await session.execute(serving.live_workers(stale_seconds=stale_seconds, model=row["model"]))
    return queued_eta(position, [w._mapping for w in live])
