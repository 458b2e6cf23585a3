"""Views of evaluations: progress and live results, reports, comparisons."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from shared import serving
from shared.db.session import AsyncDatabase
from shared.evaluations import repository, results
from shared.evaluations.graders import PASSED
from shared.evaluations.status import RunStatus
from shared.evaluations.views import (
    OUTCOMES,
    configuration_object,
    counts_of,
    evaluation_object,
    item_object,
)
from shared.jobs.status import JobStatus
from shared.settings import Settings

KEPT = 200  # results of runs that are over, in memory
FAILURES_SHOWN = 20  # in a report, of each configuration
_OPEN_JOBS = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)


class EvaluationReader:
    """One per API process."""

    def __init__(self, database: AsyncDatabase, settings: Settings) -> None:
        self._database = database
        self._stale_seconds = settings.worker_stale_seconds
        self._kept: dict[tuple[Any, ...], dict[str, Any]] = {}

    async def _read(self, statement: Any) -> Sequence[Row[Any]]:
        async with self._database.read() as session:
            return list((await session.execute(statement)).all())

    async def numbers(self, run: Row[Any]) -> Sequence[Row[Any]]:
        return await self._read(repository.numbers(run.id))

    async def show(self, row: Row[Any]) -> dict[str, Any]:
        """The evaluation, its results as they are by now."""
        runs = await self._read(repository.runs(row.id))
        outcomes = counts_of(await self._read(repository.progress(row.id)), OUTCOMES, "outcome")
        jobs = counts_of(await self._read(repository.open_jobs(row.id)), _OPEN_JOBS, "status")
        live = {
            w.model
            for w in await self._read(serving.live_workers(stale_seconds=self._stale_seconds))
        }
        made = []
        for run in runs:
            graded = outcomes[run.id]
            errors = await self._read(repository.top_errors(run.id)) if graded["error"] else []
            made.append(
                configuration_object(
                    run,
                    graded,
                    jobs[run.id],
                    await self._results(run, graded) if any(graded.values()) else None,
                    [dict(e._mapping) for e in errors],
                    served=run.model in live,
                )
            )
        return evaluation_object(row, made)

    async def _results(self, run: Row[Any], graded: dict[str, int]) -> dict[str, Any]:
        key = (run.id, run.finished_at, *graded.values())
        if key not in self._kept:
            rows = await self.numbers(run)
            found = await asyncio.to_thread(results.results_of, rows)
            if run.status == RunStatus.IN_PROGRESS:
                return found
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return self._kept[key]

    async def compare(
        self, first: tuple[Row[Any], Row[Any]], second: tuple[Row[Any], Row[Any]], **options: Any
    ) -> dict[str, Any]:
        """Args: first, second: evaluation and run. Raises NothingToCompare."""
        one, other = await self.numbers(first[1]), await self.numbers(second[1])
        made = await asyncio.to_thread(results.compare, one, other, **options)
        return {
            "object": "evaluation.comparison",
            **{
                side: {"evaluation": evaluation.id, "configuration": run.name, "score": made[side]}
                for side, (evaluation, run) in (("first", first), ("second", second))
            },
            **{name: value for name, value in made.items() if name not in ("first", "second")},
        }

    async def report(self, row: Row[Any]) -> dict[str, Any]:
        """The evaluation with every configuration compared with the first, latencies, and items
        that did not pass.
        """
        runs = await self._read(repository.runs(row.id))
        shown = await self.show(row)
        rows = [await self.numbers(run) for run in runs]
        comparisons, failures = [], []
        for run, numbers in list(zip(runs, rows, strict=True))[1:]:
            try:
                made = await asyncio.to_thread(results.compare, rows[0], numbers)
            except results.NothingToCompare:
                continue  # nothing is graded yet
            comparisons.append({"first_name": runs[0].name, "second_name": run.name, **made})
        for run in runs:
            statement = repository.samples(
                row.id,
                configuration=run.name,
                outcome=None,
                after=None,
                limit=FAILURES_SHOWN,
                whole=True,
            )
            samples = await self._read(statement)
            failures += [item_object(s) for s in samples[:FAILURES_SHOWN] if s.outcome != PASSED]
        return {
            "object": "evaluation.report",
            "evaluation": shown,
            "comparisons": comparisons,
            "latency_curves": {
                run.name: results.latency_curve(numbers)
                for run, numbers in zip(runs, rows, strict=True)
            },
            "not_passed": failures,
        }
