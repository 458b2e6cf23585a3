"""When a job may be done: an estimate from what the model's live workers measured. None where nothing was measured yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shared import serving
from shared.db.session import AsyncDatabase, AsyncReadSession
from shared.jobs import queries
from shared.jobs.status import JobStatus
from shared.sampling_params import RULE_PARAMETERS, SamplingParams


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


def forwards_of(params: SamplingParams) -> tuple[int, int]:
    """The fewest and the most model calls that a request may take."""
    blocks = len(params.blocks())
    diffusion = params.diffusion
    if "steps" in RULE_PARAMETERS.get(diffusion.algorithm, ()):
        steps = diffusion.steps or params.max_tokens
        return blocks * params.n, steps * params.n  # an end token may end it early
    return blocks * params.n, params.max_tokens * params.n


def run_seconds(forwards: int, workers: Sequence[Mapping[Any, Any]]) -> float | None:
    """By the engines' mean step."""
    engines = [w["stats"].get("engine", {}) for w in workers]
    steps = sum(e.get("steps", 0) for e in engines)
    if not steps:
        return None
    seconds: float = sum(e.get("step_seconds", 0.0) for e in engines)
    expected: float = round(forwards * seconds / steps, 3)
    return expected


async def estimate_object(database: AsyncDatabase, values: Mapping[str, Any], stale_seconds: float) -> dict[str, Any]:
    """What a job that was prepared would take."""
    params = SamplingParams.from_json(values["params"])
    fewest, most = forwards_of(params)
    now = {**values, "queued_at": datetime.now(UTC)}
    async with database.read() as session:
        position = (await session.execute(queries.queue_position(now))).scalar_one() + 1
        live = await session.execute(serving.live_workers(stale_seconds=stale_seconds, model=values["model"]))
        workers = [w._mapping for w in live]
    run = run_seconds(most, workers)
    waiting = queued_eta(position, workers)
    slots = sum(w["slots"] for w in workers)
    wait = 0.0 if slots >= position else waiting
    return {
        "object": "job.estimate",
        "endpoint": values["endpoint"],
        "model": values["model"],
        "tokens": {
            "prompt": len(values["prompt_token_ids"]),
            "max_completion": params.max_tokens * params.n,
            "max_total": values["tokens"],
        },
        "forwards": {"min": fewest, "max": most},
        "queue_position": position,
        "workers": len(workers),
        "run_seconds": run,
        "expected_seconds": None if run is None or wait is None else round(run + wait, 3),
    }
