"""Processing of evaluations between requests, in every API process. One process at a time holds
one, under a lease.

    store     make jobs of the samples that are none yet, a chunk a transaction together with the
              count of what is stored
    grade     look at the jobs that are over, a chunk a transaction; the primary key refuses a
              sample twice
    end       of a run when all is graded; of the evaluation when no run is open

A process that dies leaves the rows as they are: another goes on behind the last chunk that was
committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Executable, Row, Update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db.session import AsyncDatabase
from shared.errors import ModelNotFound, VDiffError
from shared.evaluations import grading, repository
from shared.evaluations.grader_requests import parse_graders
from shared.evaluations.requests import Prompt, parse_prompt, sample_seed
from shared.evaluations.sandbox_pool import SandboxPool
from shared.evaluations.service import submission_of
from shared.evaluations.status import EvaluationStatus, RunStatus
from shared.events import publish_cancel
from shared.jobs import queries
from shared.jobs.deadlines import Deadlines
from shared.jobs.limits import Queued, read_queued
from shared.jobs.requests import parse
from shared.jobs.service import JobService, Served
from shared.jobs.status import JobStatus, Priority
from shared.keys.limits import read_limits
from shared.keys.principal import Principal
from shared.leases import LOOK_SECONDS, Caretaker, Lost
from shared.metrics import EVALUATION_SAMPLES
from shared.settings import Settings

SLICE_SECONDS = 5.0  # of one look; then another evaluation has its turn
STORE_CHUNK = 250  # samples, in one transaction
STORE_CHUNKS = 4  # of one run, before another has its turn
CANCEL_LOOK_SECONDS = 0.5
REST = 5  # times as long as a look took, so that large evaluations are not looked at all the time
REST_SECONDS_MAX = 5.0  # whoever waits wants to see the first grades
DAY_SECONDS = 86_400.0
LOST_ERROR = {
    "code": "job_gone",
    "message": "the job was forgotten before it was graded",
    "param": None,
}

_log = structlog.get_logger(__name__)


def pause_after(took_seconds: float, *, cancelling: bool) -> float:
    """Until the next look, after one that took so long and found nothing to do at once."""
    if cancelling:
        return CANCEL_LOOK_SECONDS
    return min(max(LOOK_SECONDS, REST * took_seconds), REST_SECONDS_MAX)


class EvaluationCaretaker(Caretaker):
    kind = "evaluation"

    def __init__(
        self,
        database: AsyncDatabase,
        client: redis.asyncio.Redis,
        jobs: JobService,
        settings: Settings,
        wake: asyncio.Event,
        sandboxes: SandboxPool,
    ) -> None:
        super().__init__(database, lease_seconds=settings.lease_seconds, wake=wake)
        self._redis = client
        self._jobs = jobs
        self._settings = settings
        self._sandboxes = sandboxes

    def claim(self, holder: str, *, served: Sequence[str], full: Sequence[str]) -> Update:
        return repository.claim(holder, self._lease, served=served, full=full)

    def release(self, row_id: str, holder: str, *, for_seconds: float) -> Update:
        return repository.release(row_id, holder, for_seconds=for_seconds)

    async def see_to(self, row: Row[Any], holder: str) -> float:
        work = _Work(self, row, holder)
        keeper = asyncio.create_task(work.keep())
        try:
            return await work.run()
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper


@dataclass(frozen=True, slots=True)
class _Made:
    """The outcome of one sample: a job, or the error that is stored as its sample."""

    job: dict[str, Any] | None
    error: dict[str, Any] | None


def _fitting(made: Sequence[_Made], queued: Queued) -> int:
    """Return how many of the samples, from the first on, have room in the queue."""
    left = queued.count_fitting([one.job["tokens"] for one in made if one.job is not None])
    for count, one in enumerate(made):
        if one.job is not None:
            if not left:
                return count
            left -= 1
    return len(made)


class _Work:
    """One hold of one evaluation."""

    def __init__(self, caretaker: EvaluationCaretaker, row: Row[Any], holder: str) -> None:
        self._database = caretaker._database
        self._redis = caretaker._redis
        self._jobs = caretaker._jobs
        self._settings = caretaker._settings
        self._lease = caretaker._lease
        self._row = row
        self._holder = holder
        self._waits_for_room = False
        self._prompt: Prompt = parse_prompt(row.template, row.endpoint)
        # The operator may have turned graders of code off since this one was accepted.
        self._sandboxes = caretaker._sandboxes if caretaker._settings.code_graders else None
        self._graders = parse_graders(row.graders, code_allowed=True)

    @property
    def _cancelling(self) -> bool:
        return bool(self._row.status == EvaluationStatus.CANCELLING)

    async def keep(self) -> None:
        """Renew the lease while graders take their time; a write of the work finds out when it is
        lost.
        """
        while True:
            await asyncio.sleep(self._lease / 3)
            with suppress(SQLAlchemyError, OSError, Lost):
                await self._write()

    async def _write(self, *statements: Executable) -> None:
        """All in one transaction that only the holder can make."""
        async with self._database.write() as session:
            await self._hold(session)
            for statement in statements:
                await session.execute(statement)

    async def _hold(self, session: AsyncSession) -> None:
        """Renew the lease in this transaction. Raises Lost."""
        held = repository.hold(self._row.id, self._holder, lease_seconds=self._lease)
        if (await session.execute(held)).one_or_none() is None:
            raise Lost

    async def run(self) -> float:
        """One look, no longer than a slice and what was begun in it; the seconds until the next."""
        began = asyncio.get_running_loop().time()
        async with self._database.read() as session:
            runs = (await session.execute(repository.runs(self._row.id))).all()
        busy = False
        for run in runs:
            if run.status == RunStatus.IN_PROGRESS:
                busy |= await self._see_to(run)
            if asyncio.get_running_loop().time() - began >= SLICE_SECONDS:
                busy = True
                break
        async with self._database.write() as session:
            ended = (
                await session.execute(repository.finish(self._row.id, self._holder))
            ).one_or_none()
        if ended is not None:
            _log.info("evaluation_ended", evaluation_id=self._row.id, now=ended.status)
            return 0.0
        if busy:
            return 0.0
        return pause_after(asyncio.get_running_loop().time() - began, cancelling=self._cancelling)

    async def _see_to(self, run: Row[Any]) -> bool:
        """One run; whether there is more to do at once."""
        stored = run.stored
        if self._cancelling:
            if await self._cancel_jobs(run):
                return True
        else:
            try:
                served = await self._served(run)
            except VDiffError as exc:
                if stored < run.total or (await self._counts(run)).open:
                    return await self._give_up(run, exc)
                # All its answers are in: grading them needs no model.
            else:
                if stored < run.total:
                    stored = await self._store(run, served)
        if await self._grade(run):
            return True
        return await self._end(run, stored)

    async def _served(self, run: Row[Any]) -> Served:
        """Raises ModelNotFound: nobody serves what the run was begun with."""
        served = await self._jobs.served(run.model, self._row.endpoint)
        revision = served[0].card.revision
        if revision != run.revision:
            message = f"{run.model} is served in revision {revision} now; this configuration began with {run.revision}"
            raise ModelNotFound(message, code="model_revision_changed", param="model")
        return served

    async def _give_up(self, run: Row[Any], exc: VDiffError) -> bool:
        """Keep what is graded and run nothing more. Return whether there is more to do at once."""
        if await self._grade(run):
            return True
        # At once: another look would take a run whose jobs are all over for one that is complete.
        # No grader runs for these.
        while await self._cancel_jobs(run):
            pass
        while await self._grade(run):
            pass
        error = {"code": exc.code, "message": exc.message, "param": exc.param}
        await self._write(repository.end_run(run.id, RunStatus.FAILED, error))
        _log.warning("evaluation_run_failed", run_id=run.id, code=exc.code, error=exc.message)
        return False

    async def _counts(self, run: Row[Any]) -> Row[Any]:
        async with self._database.read() as session:
            counts: Row[Any] = (await session.execute(repository.run_counts(run.id))).one()
        return counts

    async def _end(self, run: Row[Any], stored: int) -> bool:
        counts = await self._counts(run)
        if counts.graded >= run.total:
            await self._write(repository.end_run(run.id, RunStatus.COMPLETED))
        elif self._cancelling:
            if not counts.open:
                await self._write(repository.end_run(run.id, RunStatus.CANCELLED))
        elif stored < run.total:
            return not self._waits_for_room
        elif not counts.open and not await self._grade(run):
            await self._write(repository.lost_samples(run.id, self._row.items, LOST_ERROR))
            return True
        return False

    # Jobs

    async def _store(self, run: Row[Any], served: Served) -> int:
        """Make jobs of samples, as many as the key's queue has room for; return how many samples
        are stored now.
        """
        stored: int = run.stored
        for _ in range(STORE_CHUNKS):
            if stored >= run.total:
                break
            repeat, before = divmod(stored, self._row.items)
            last = min(before + STORE_CHUNK, self._row.items)
            async with self._database.read() as session:
                items = (
                    await session.execute(repository.items(self._row.id, before + 1, last))
                ).all()
            made = await asyncio.to_thread(self._prepare, run, served, repeat, items)
            count = await self._store_chunk(run, stored, made)
            stored += count
            if count < len(made):
                self._waits_for_room = True
                break
        return stored

    async def _store_chunk(self, run: Row[Any], stored: int, made: Sequence[_Made]) -> int:
        """Store samples in one transaction that only the holder can make; return how many fitted."""
        expired = run.expires_at <= datetime.now(UTC)
        async with self._jobs.queue_writes.write((self._row.tenant, run.key_id)) as session:
            await self._hold(session)
            count = len(made)
            if (
                not expired
            ):  # those whose time is over expire as they become jobs, and wait for no room
                limits = await read_limits(session, run.key_id, self._settings)
                queued = await read_queued(
                    session, (self._row.tenant, run.key_id), limits, lock=True
                )
                count = _fitting(made, queued)
            jobs = [one.job for one in made[:count] if one.job is not None]
            errors = [one.error for one in made[:count] if one.error is not None]
            await session.execute(repository.note_stored(run.id, stored + count))
            if jobs:
                await session.execute(queries.insert_lines(jobs))
            if errors:
                await session.execute(repository.insert_samples(errors))
            if expired:
                await session.execute(repository.expire_jobs(run.id))
        return count

    def _prepare(
        self, run: Row[Any], served: Served, repeat: int, items: Sequence[Row[Any]]
    ) -> list[_Made]:
        """A job for each item, or the sample of one that makes none: a prompt that is too long, for
        one.
        """
        principal = Principal(self._row.tenant, frozenset(), key_id=run.key_id or None)
        retain = self._settings.default_retain_seconds
        if retain is not None:
            retain += (
                self._row.window_seconds + DAY_SECONDS
            )  # no answer is purged before it is graded
        more: dict[str, Any] = {
            "priority": Priority.BULK,
            "metadata": {"evaluation_id": self._row.id, "configuration": run.name},
            "deadlines": Deadlines(complete_by=run.expires_at, retain_for=retain),
        }
        made = []
        for item in items:
            number = repeat * self._row.items + item.number
            seed = sample_seed(run.seeds[repeat], item.number)
            try:
                submission = submission_of(
                    run.model,
                    run.fields,
                    seed,
                    self._prompt,
                    item.data,
                    principal,
                    custom_id=f"item-{item.number}-{repeat}",
                    **more,
                )
                request = parse(submission.endpoint, submission.body, streaming=False)
                prepared = self._jobs.complete(submission, request, served)
            except VDiffError as exc:
                error = {"code": exc.code, "message": exc.message, "param": exc.param}
                made.append(
                    _Made(
                        None, grading.unanswered(run.id, number, item.number, repeat, None, error)
                    )
                )
                continue
            of_run = {
                "batch_id": run.id,
                "batch_line": number,
                "pushed_at": None,
                "pinned_revision": run.revision,
            }
            made.append(_Made({**prepared.values, **of_run}, None))
        return made

    async def _cancel_jobs(self, run: Row[Any]) -> bool:
        """Cancel a chunk of the run's jobs; return whether there were any."""
        async with self._database.write() as session:
            moved = (await session.execute(repository.cancel_jobs(run.id))).all()
        for job in moved:
            if job.status == JobStatus.RUNNING:
                try:
                    await publish_cancel(self._redis, job.id)
                except (RedisError, OSError) as exc:
                    _log.warning(
                        "publish_failed", job_id=job.id, error=type(exc).__name__
                    )  # heartbeat brings it
        return bool(moved)

    # Grades

    async def _grade(self, run: Row[Any]) -> int:
        """The next answers; how many."""
        async with self._database.read() as session:
            statement = repository.to_grade(
                run.id, cancelled_too=not self._cancelling, limit=grading.chunk_of(self._graders)
            )
            rows = (await session.execute(statement)).all()
        if rows:
            samples: list[Mapping[str, Any]] = await grading.grade_all(
                rows,
                self._graders,
                run_id=run.id,
                items=self._row.items,
                tenant=self._row.tenant,
                pool=self._sandboxes,
                seconds=SLICE_SECONDS,
            )
            await self._write(repository.insert_samples(samples))
            for sample in samples:
                EVALUATION_SAMPLES.labels(outcome=sample["outcome"]).inc()
        return len(rows)
