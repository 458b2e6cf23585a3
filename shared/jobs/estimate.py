"""Estimates of when a job ends, from its place in the queue and the throughput of the live workers.
None without measurements.

Forecasts are kept honest: some are stored with their job, and `Calibration` compares them with what
came; the range that clients see is made of that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import quantiles
from typing import Any

from sqlalchemy import Row

from shared import serving
from shared.db.session import AsyncDatabase, AsyncReadSession
from shared.jobs import lanes, queries, suspects
from shared.jobs.status import JobStatus, Priority
from shared.jobs.tasks import PromptsTask, ScoreTask, task_of
from shared.jobs.turns import Who
from shared.sampling_params import SamplingParams

OUTCOMES_MIN = 20  # fewer say nothing about a range
OUTCOMES_SECONDS = 3600.0  # how far back they count
CALIBRATION_SECONDS = 5.0
STORE_EVERY_SECONDS = 0.1


def running_eta(progress: Mapping[str, Any] | None, elapsed_seconds: float) -> float | None:
    """Estimate the remaining seconds from the tokens committed so far, at the same pace."""
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


def place(row: Mapping[Any, Any], depths: Sequence[Mapping[Any, Any]], ahead: int) -> int:
    """The place of a queued job, 1 being next: more urgent jobs, those of its own lane, and the
    other lanes' turns.

    Args:
        depths: {priority, tenant, key_id, jobs} of the model's lanes.
        ahead: jobs of its own lane before it.
    """
    rank = Priority(row["priority"]).rank
    before = ahead
    for lane in depths:
        theirs = Priority(lane["priority"]).rank
        if theirs < rank:
            before += lane["jobs"]
        elif theirs == rank and _who(lane) != _who(row):
            before += min(lane["jobs"], ahead + 1)  # a turn each
    return before + 1


def _who(row: Mapping[Any, Any]) -> Who:
    return row["tenant"], row["key_id"]


def without_suspects(
    depths: Iterable[Row[Any]], suspected: Iterable[Row[Any]]
) -> list[dict[str, Any]]:
    """Return the lanes with the jobs that take turns; suspects run apart from them.

    Args:
        depths: from `lanes.depths`.
        suspected: from `suspects.per_lane`.
    """
    apart = {(row.model, row.priority, row.tenant, row.key_id): row.jobs for row in suspected}
    counted = [
        (row, apart.get((row.model, row.priority, row.tenant, row.key_id), 0)) for row in depths
    ]
    return [
        {**row._mapping, "jobs": max(0, row.jobs - suspect_jobs)} for row, suspect_jobs in counted
    ]


async def queue_position(session: AsyncReadSession, row: Mapping[Any, Any]) -> int:
    """Return the place of a queued job, 1 being next; of a suspect, its place among suspects.

    A job deep in a long lane is placed by its age; the jobs before it are not counted.
    """
    if row.get("isolation") is not None:
        before: int = (await session.execute(suspects.ahead(row))).scalar_one()
        return before + 1
    depths = without_suspects(
        await session.execute(lanes.depths(row["model"])),
        await session.execute(suspects.per_lane(row["model"])),
    )
    ahead: int = (await session.execute(lanes.ahead_in_lane(row))).scalar_one()
    if ahead >= lanes.AHEAD_MAX:
        own = next(
            (
                d["jobs"]
                for d in depths
                if d["priority"] == row["priority"] and _who(d) == _who(row)
            ),
            0,
        )
        first = await session.execute(lanes.oldest([(row["model"], row["priority"], *_who(row))]))
        oldest = first.first()
        age = (datetime.now(UTC) - row["queued_at"]).total_seconds()
        share = 1 - age / float(oldest.seconds) if oldest is not None and oldest.seconds else 1.0
        ahead = max(ahead, int(own * min(1.0, max(0.0, share))) - 1)
    return place(row, depths, ahead)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Quantiles of actual over forecast seconds of a model's jobs."""

    count: int = 0
    low: float = 1.0  # a tenth of the jobs were done sooner
    middle: float = 1.0
    high: float = 1.0  # a tenth took longer

    @classmethod
    def of(cls, outcomes: Sequence[tuple[float, float]]) -> Calibration:
        """From (forecast, actual) seconds."""
        ratios = sorted(actual / forecast for forecast, actual in outcomes if forecast > 0)
        if len(ratios) < OUTCOMES_MIN:
            return cls(len(ratios))
        tenths = quantiles(ratios, n=10)
        return cls(len(ratios), tenths[0], tenths[4], tenths[8])

    def range_of(self, eta: float | None) -> list[float] | None:
        """Return the range in which eight of ten jobs with this estimate end; None before enough
        were measured.
        """
        if eta is None or self.count < OUTCOMES_MIN:
            return None
        return [round(eta * self.low, 1), round(eta * self.high, 1)]


class Forecasts:
    """The calibration of each model, read anew every few seconds; and which forecasts are stored."""

    def __init__(self, database: AsyncDatabase) -> None:
        self._database = database
        self._known: dict[str, tuple[float, Calibration]] = {}
        self._stored_at = float("-inf")

    async def calibration(self, model: str) -> Calibration:
        read_at, known = self._known.get(model, (float("-inf"), Calibration()))
        if time.monotonic() - read_at < CALIBRATION_SECONDS:
            return known
        self._known[model] = (time.monotonic(), known)  # others need not ask at the same time
        async with self._database.read() as session:
            rows = (
                await session.execute(lanes.outcomes(model, within_seconds=OUTCOMES_SECONDS))
            ).all()
        known = Calibration.of([(float(r.forecast), float(r.actual)) for r in rows])
        self._known[model] = (time.monotonic(), known)
        return known

    async def store(self, job_id: str, eta: float | None) -> None:
        """Keep a forecast for comparison; a few a second are enough."""
        if eta is None or time.monotonic() - self._stored_at < STORE_EVERY_SECONDS:
            return
        self._stored_at = time.monotonic()
        async with self._database.write() as session:
            await session.execute(queries.note_forecast(job_id, eta))


async def eta_seconds(
    session: AsyncReadSession, row: Mapping[Any, Any], position: int | None, stale_seconds: float
) -> float | None:
    """Estimate the remaining seconds of a job that is not over."""
    if row["status"] == JobStatus.RUNNING:
        return running_eta(row["progress"], (datetime.now(UTC) - row["started_at"]).total_seconds())
    if position is None:
        return None
    live = await session.execute(
        serving.live_workers(stale_seconds=stale_seconds, model=row["model"])
    )
    return queued_eta(position, [w._mapping for w in live])


def forwards_of(params: SamplingParams) -> tuple[int, int]:
    """The fewest and the most model calls that a request may take; an end token may end it before."""
    d, tokens = params.diffusion, params.max_tokens
    blocks = -(-tokens // (d.block_length or tokens))
    most = tokens
    if d.max_denoising_steps is not None:
        most = blocks * d.max_denoising_steps
    elif d.denoising_steps is not None:
        most = (
            blocks + 1
        ) * d.denoising_steps  # the prompt's end may share a block with the answer
    elif d.steps is not None:
        most = min(d.steps, tokens)
    if d.max_post_edit_steps is not None:
        most += (blocks + 1) * d.max_post_edit_steps
    if d.max_forwards is not None:
        most = min(most, d.max_forwards)
    return min(blocks, most) * params.n, most * params.n


def run_seconds(forwards: int, workers: Sequence[Mapping[Any, Any]]) -> float | None:
    """Estimate the run time from the mean step time of the engines."""
    engines = [w["stats"].get("engine", {}) for w in workers]
    steps = sum(e.get("steps", 0) for e in engines)
    if not steps:
        return None
    seconds: float = sum(e.get("step_seconds", 0.0) for e in engines)
    expected: float = round(forwards * seconds / steps, 3)
    return expected


async def estimate_object(
    database: AsyncDatabase, values: Mapping[str, Any], stale_seconds: float
) -> dict[str, Any]:
    """Return the estimate of a prepared job as the wire shows it."""
    params, task = SamplingParams.from_json(values["params"]), task_of(values["params"])
    fewest, most = forwards_of(params)
    prompt = len(values["prompt_token_ids"])
    if isinstance(task, ScoreTask):
        fewest = most = task.forwards
    elif isinstance(task, PromptsTask):
        fewest, most = fewest * len(task.tokens), most * len(task.tokens)
    elif task is not None:
        prompt = (
            values["tokens"] - params.max_tokens * params.n
        )  # what is fixed behind the first hole counts as answer
    moments = [m for m in (values["start_by"], values["complete_by"]) if m is not None]
    deadline = min(moments, default=None)
    now = {**values, "queued_at": datetime.now(UTC), "deadline": deadline}
    async with database.read() as session:
        position = await queue_position(session, now)
        live = await session.execute(
            serving.live_workers(stale_seconds=stale_seconds, model=values["model"])
        )
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
            "prompt": prompt,
            "max_completion": values["tokens"] - prompt,
            "max_total": values["tokens"],
        },
        "forwards": {"min": fewest, "max": most},
        "queue_position": position,
        "workers": len(workers),
        "run_seconds": run,
        "expected_seconds": None if run is None or wait is None else round(run + wait, 3),
    }
