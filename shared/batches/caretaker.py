"""Processing of batches between requests, in every API process. One process at a time holds a
batch, under a lease.

    validating    read the file, check every line; all good: in_progress, else failed with the
                  lines' numbers
    in_progress   make a job of every line, a chunk a transaction; wait until none is open
    cancelling    cancel the lines that are open, those that are no jobs yet included: each is then
                  a cancelled job
    finalizing    write the output and the error file; they appear with the batch's end, in one
                  transaction

A process that dies leaves the row as it is: another takes it over when the lease runs out, and goes
on after the last chunk that was committed. Files that it had begun are never seen and go later
(`FileService.clean`).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Row, Update, func
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from shared import counts
from shared.batches import repository
from shared.batches.lines import (
    InputLine,
    LineSplitter,
    has_request,
    output_line,
    parse_line,
    unstored_line,
)
from shared.batches.status import BatchStatus
from shared.batches.views import summary_of
from shared.db.session import AsyncDatabase
from shared.errors import TooManyRequests, VDiffError
from shared.events import publish_cancel
from shared.fair_turns import FairTurns
from shared.files.service import (
    OUTPUT_PURPOSE,
    FileNotFound,
    FileService,
    Upload,
    publish_statement,
)
from shared.files.store import ContentMissing
from shared.jobs import lanes, queries
from shared.jobs.bodies import Request, parse
from shared.jobs.deadlines import Deadlines
from shared.jobs.limits import Queued, read_queued
from shared.jobs.service import JobService, Prepared, Served, Submission
from shared.jobs.status import JobStatus, Priority
from shared.keys.principal import Limits, Principal
from shared.leases import Caretaker, Lost
from shared.settings import Settings

LINES_CHUNK = 250  # checked in one go in a thread, stored in one transaction
HELD = 8  # batches that one process holds, of one tenant all but one
TURNS = 3  # chunks of theirs that it works on at once, tenants in turns
MAX_ERRORS = 100  # of validation; then it stops looking
CLEAN_SECONDS = 60.0
ROLL_UP_SECONDS = 5.0
CANCEL_LOOK_SECONDS = 0.5
ROOM_LOOK_SECONDS = 2.0  # between looks for room in the key's queue
DAY_SECONDS = 86_400.0
MAX_OUTPUT_BYTES = 1 << 40

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Checked:
    """A chunk of lines, checked."""

    prepared: list[tuple[InputLine, Prepared]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)


class LineChecker:
    """Checks a file's lines as `JobService.prepare` checks a job, and against each other."""

    def __init__(
        self, jobs: JobService, row: Row[Any], deadlines: Deadlines, max_lines: int
    ) -> None:
        self._jobs = jobs
        self._row = row
        self._deadlines = deadlines
        self._max_lines = max_lines
        self._principal = Principal(row.tenant, frozenset(), key_id=row.key_id or None)
        self._served: Served | None = None
        self._seen: dict[str, int] = {}  # custom_id -> line
        self.count = 0
        self.tokens = 0

    @property
    def model(self) -> str | None:
        return None if self._served is None else self._served[0].name

    async def check(self, lines: Sequence[tuple[int, bytes | None]]) -> Checked:
        checked = Checked()
        parsed = await asyncio.to_thread(self._parse, lines, checked)
        if parsed and self._served is None:
            line, request = parsed[0]
            try:
                self._served = await self._jobs.served(request.model, request.endpoint)
            except VDiffError as exc:
                checked.errors.append(line_error(exc, line.number, inner=True))
                return checked
        await asyncio.to_thread(self._complete, parsed, checked)
        return checked

    def _parse(
        self, lines: Sequence[tuple[int, bytes | None]], checked: Checked
    ) -> list[tuple[InputLine, Request]]:
        parsed = []
        for number, raw in lines:
            try:
                line = parse_line(number, raw, self._row.endpoint)
            except VDiffError as exc:
                checked.errors.append(line_error(exc, number, inner=False))
                continue
            if line is None:
                continue
            self.count += 1
            if self.count > self._max_lines:
                if self.count == self._max_lines + 1:
                    message = f"a batch takes at most {self._max_lines} lines"
                    checked.errors.append(error_object("too_many_lines", message, None, number))
                continue
            first = self._seen.setdefault(line.custom_id, number)
            if first != number:
                message = f"custom_id {line.custom_id!r} is that of line {first} too"
                checked.errors.append(
                    error_object("duplicate_custom_id", message, "custom_id", number)
                )
                continue
            try:
                parsed.append((line, parse(self._row.endpoint, line.body, streaming=False)))
            except VDiffError as exc:
                checked.errors.append(line_error(exc, number, inner=True))
        return parsed

    def _complete(self, parsed: Sequence[tuple[InputLine, Request]], checked: Checked) -> None:
        if self._served is None:
            return
        for line, request in parsed:
            if request.model != self._served[0].name:
                message = f"the line asks for {request.model!r}, the first one for {self._served[0].name!r}"
                checked.errors.append(
                    error_object("mismatched_model", message, "body.model", line.number)
                )
                continue
            submission = Submission(
                endpoint=self._row.endpoint,
                body=line.body,
                principal=self._principal,
                priority=Priority.BULK,
                custom_id=line.custom_id,
                deadlines=self._deadlines,
            )
            try:
                prepared = self._jobs.complete(submission, request, self._served)
            except VDiffError as exc:
                checked.errors.append(line_error(exc, line.number, inner=True))
                continue
            self.tokens += prepared.values["tokens"]
            checked.prepared.append((line, prepared))


def error_object(code: str, message: str, param: str | None, line: int | None) -> dict[str, Any]:
    """OpenAI's error of a batch."""
    return {"code": code, "message": message, "param": param, "line": line}


def line_error(exc: VDiffError, line: int, *, inner: bool) -> dict[str, Any]:
    """Args: inner: whether the error is one of the line's `body`."""
    param = exc.param
    if inner and param != "body":
        param = "body" if param is None else f"body.{param}"
    return error_object(exc.code, exc.message, param, line)


class BatchCaretaker(Caretaker):
    kind = "batch"
    together = HELD

    def __init__(
        self,
        database: AsyncDatabase,
        client: redis.asyncio.Redis,
        jobs: JobService,
        files: FileService,
        settings: Settings,
        wake: asyncio.Event,
    ) -> None:
        super().__init__(database, lease_seconds=settings.lease_seconds, wake=wake)
        self._redis = client
        self._jobs = jobs
        self._files = files
        self._settings = settings
        self._turns = FairTurns(TURNS)
        self._next_clean = 0.0
        self._next_roll_up = 0.0

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

    async def now_and_then(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_clean:
            # As long as something is cleaned there may be more, which the next look takes.
            self._next_clean = now + (0.0 if await self._files.clean() else CLEAN_SECONDS)
        if now >= self._next_roll_up:
            # Dispatchers do it all the time. While no worker lives somebody must: every submission
            # reads what is not summed.
            self._next_roll_up = now + ROLL_UP_SECONDS
            async with self._database.write() as session:
                await session.execute(lanes.roll_up())
                await session.execute(counts.roll_up())


class _Work:
    """One hold of one batch."""

    def __init__(self, caretaker: BatchCaretaker, row: Row[Any], holder: str) -> None:
        self._database = caretaker._database
        self._redis = caretaker._redis
        self._jobs = caretaker._jobs
        self._files = caretaker._files
        self._settings = caretaker._settings
        self._lease = caretaker._lease
        self._row = row
        self._holder = holder
        self._turn = functools.partial(caretaker._turns.turn, row.tenant)

    async def keep(self) -> None:
        """Renew the lease while the batch waits for its turn; a write of the work finds out when it
        is lost.
        """
        while True:
            await asyncio.sleep(self._lease / 3)
            with suppress(SQLAlchemyError, OSError):
                async with self._database.write() as session:
                    statement = repository.hold(
                        self._row.id, self._holder, lease_seconds=self._lease
                    )
                    await session.execute(statement)

    async def run(self) -> float:
        """Do what the batch's state asks for; the seconds until it needs somebody again."""
        if self._row.status == BatchStatus.VALIDATING:
            await self._validate()
        if self._row.status == BatchStatus.CANCELLING:
            await self._cancel_open()
        if (
            self._row.status in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
            and self._unstored_count()
        ):
            if not await self._has_room():
                return ROOM_LOOK_SECONDS
            await self._store()
            if self._row.status == BatchStatus.IN_PROGRESS and self._unstored_count():
                return ROOM_LOOK_SECONDS
        if self._row.status == BatchStatus.CANCELLING and await self._has_open_jobs():
            return CANCEL_LOOK_SECONDS
        if (
            self._row.status in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
            and await self._has_open_jobs()
        ):
            return 0.0  # `claim` looks for the end of the last one
        if self._row.status in (
            BatchStatus.IN_PROGRESS,
            BatchStatus.CANCELLING,
            BatchStatus.FINALIZING,
        ):
            await self._finalize()
        return 0.0

    def _unstored_count(self) -> int:
        """Lines that are no jobs yet, of those that were accepted: none before the batch is
        validated.
        """
        return (self._row.total or 0) - int(self._row.stored)

    async def _move(self, *sources: BatchStatus, **values: Any) -> None:
        async with self._database.write() as session:
            await self._move_in(session, *sources, **values)

    async def _move_in(self, session: Any, *sources: BatchStatus, **values: Any) -> None:
        statement = repository.move(
            self._row.id, self._holder, *sources, lease_seconds=self._lease, **values
        )
        row = (await session.execute(statement)).one_or_none()
        if row is None:
            raise Lost
        self._row = row

    async def _chunks(self) -> AsyncIterator[list[tuple[int, bytes | None]]]:
        """The input's lines, some at a time."""
        file = await self._files.get(self._row.input_file_id, self._row.tenant)
        splitter = LineSplitter()
        async for data in self._files.read(file):
            lines = splitter.feed(data)
            for start in range(0, len(lines), LINES_CHUNK):
                yield lines[start : start + LINES_CHUNK]
        yield splitter.finish()

    def _checker(self) -> LineChecker:
        retain = self._settings.default_retain_seconds
        if retain is not None:
            # No line is purged before the batch's files are written.
            retain += self._row.window_seconds + DAY_SECONDS
        deadlines = Deadlines(complete_by=self._row.expires_at, retain_for=retain)
        return LineChecker(self._jobs, self._row, deadlines, self._settings.max_batch_lines)

    # validating

    async def _validate(self) -> None:
        checker = self._checker()
        errors: list[dict[str, Any]] = []
        try:
            async for lines in self._chunks():
                async with self._turn():
                    errors += (await checker.check(lines)).errors
                await self._move(BatchStatus.VALIDATING)
                if len(errors) >= MAX_ERRORS:
                    break
        except (FileNotFound, ContentMissing) as exc:
            errors = [error_object("input_file_unreadable", exc.message, "input_file_id", None)]
        if not errors and not checker.count:
            errors = [error_object("empty_file", "the file has no lines", "input_file_id", None)]
        if not errors:
            errors = await self._over_limits(checker.count, checker.tokens)
        if errors:
            await self._fail(sorted(errors, key=lambda e: e["line"] or 0)[:MAX_ERRORS])
            raise Lost
        async with self._database.write() as session:
            await self._move_in(
                session,
                BatchStatus.VALIDATING,
                status=BatchStatus.IN_PROGRESS.value,
                total=checker.count,
                model=checker.model,
                in_progress_at=func.now(),
            )
        _log.info("batch_accepted", batch_id=self._row.id, lines=checker.count)

    async def _over_limits(self, count: int, tokens: int) -> list[dict[str, Any]]:
        """Errors of a batch that does not fit beside what its key has queued: it is refused instead
        of waiting for room.
        """
        async with self._database.read() as session:
            queued = await self._queued(session, lock=False)
        try:
            queued.refuse_beyond(jobs=count, tokens=tokens)
        except TooManyRequests as exc:
            return [error_object(exc.code, exc.message, None, None)]
        return []

    async def _queued(self, session: AsyncSession, *, lock: bool) -> Queued:
        who = (self._row.tenant, self._row.key_id)
        return await read_queued(session, who, Limits(**self._row.limits), lock=lock)

    @property
    def _waits_for_room(self) -> bool:
        """Return whether its lines stay within the key's limits: not when they are cancelled or
        expired as they become jobs.
        """
        return bool(
            self._row.status == BatchStatus.IN_PROGRESS and self._row.expires_at > datetime.now(UTC)
        )

    async def _has_room(self) -> bool:
        """Return whether some lines at once would fit, so that the file is not read again for each."""
        if not self._waits_for_room:
            return True
        async with self._database.read() as session:
            queued = await self._queued(session, lock=False)
        most = (
            LINES_CHUNK
            if queued.limits.queued_jobs is None
            else max(1, queued.limits.queued_jobs // 4)
        )
        some = min(LINES_CHUNK, most, self._unstored_count())
        return queued.count_fitting([1] * some) == some

    async def _fail(self, errors: list[dict[str, Any]]) -> None:
        statement = repository.finish(
            self._row.id, self._holder, BatchStatus.FAILED, now_column="failed_at", errors=errors
        )
        async with self._database.write() as session:
            await session.execute(statement)
        _log.info(
            "batch_failed", batch_id=self._row.id, errors=len(errors), first=errors[0]["code"]
        )

    # in_progress

    async def _store(self) -> None:
        """Make jobs of the lines that are none yet; a chunk and the count of what is stored are one
        transaction.

        Of a batch that is cancelled each line is cancelled in the transaction that makes it a job,
        so no worker sees it, and files, counts and `retry_failed` know all lines that were
        accepted.
        """
        checker = self._checker()
        seen = 0
        state = BatchStatus(self._row.status)
        cancelling = state is BatchStatus.CANCELLING
        try:
            async for lines in self._chunks():
                fresh = []
                for line in lines:
                    seen += has_request(*line)
                    if seen > self._row.stored:
                        fresh.append(line)
                if not fresh:
                    continue
                async with self._turn():
                    checked = await checker.check(fresh)
                if checked.errors:  # good before, bad now: the file or the model is another
                    if cancelling:
                        return  # `_write_file` tells of the rest
                    await self._abandon(checked.errors)
                rows = [self._job_row(line, prepared) for line, prepared in checked.prepared]
                if rows and await self._store_rows(rows, state) < len(rows):
                    return  # the key's queue is full
        except (FileNotFound, ContentMissing) as exc:
            if cancelling:
                return
            await self._abandon(
                [error_object("input_file_unreadable", exc.message, "input_file_id", None)]
            )

    async def _store_rows(self, rows: Sequence[Mapping[str, Any]], state: BatchStatus) -> int:
        """Make jobs of as many lines as the key's queue has room for, in one transaction; return
        how many.
        """
        async with self._jobs.queue_writes.write((self._row.tenant, self._row.key_id)) as session:
            await self._move_in(session, state)
            if self._waits_for_room:
                queued = await self._queued(session, lock=True)
                rows = rows[: queued.count_fitting([row["tokens"] for row in rows])]
            if rows:
                await self._move_in(session, state, stored=self._row.stored + len(rows))
                await session.execute(queries.insert_lines(), rows)
            if state is BatchStatus.CANCELLING:
                await session.execute(repository.cancel_lines(self._row.id))
            elif not self._waits_for_room:
                await session.execute(repository.expire_lines(self._row.id))
        if rows and state is not BatchStatus.CANCELLING:
            await self._jobs.announce(rows[0]["model"], Priority.BULK)
        return len(rows)

    def _job_row(self, line: InputLine, prepared: Prepared) -> Mapping[str, Any]:
        return {
            **prepared.values,
            "batch_id": self._row.id,
            "batch_line": line.number,
            "pushed_at": None,
        }

    async def _abandon(self, errors: list[dict[str, Any]]) -> None:
        """The rest of the lines cannot be had: stop those that run, keep what there is in files,
        and say why.
        """
        await self._move(
            BatchStatus.IN_PROGRESS, status=BatchStatus.CANCELLING.value, errors=errors[:MAX_ERRORS]
        )
        _log.info(
            "batch_abandoned",
            batch_id=self._row.id,
            stored=self._row.stored,
            first=errors[0]["code"],
        )
        raise Lost  # whoever takes it next goes on from there

    # cancelling

    async def _cancel_open(self) -> None:
        while True:
            async with self._turn(), self._database.write() as session:
                moved = (await session.execute(repository.cancel_lines(self._row.id))).all()
            if not moved:
                return
            await self._move(BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
            for job in moved:
                if job.status == JobStatus.RUNNING:
                    try:
                        await publish_cancel(self._redis, job.id)
                    except (RedisError, OSError) as exc:
                        _log.warning(
                            "publish_failed", job_id=job.id, error=type(exc).__name__
                        )  # heartbeat brings it

    async def _has_open_jobs(self) -> bool:
        async with self._database.read() as session:
            return bool((await session.execute(repository.open_jobs(self._row.id))).scalar_one())

    # finalizing

    async def _finalize(self) -> None:
        sources = (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING, BatchStatus.FINALIZING)
        await self._move(*sources, status=BatchStatus.FINALIZING.value, finalizing_at=func.now())
        async with self._database.read() as session:
            by_status = {
                s: n for s, n in (await session.execute(repository.counts(self._row.id))).all()
            }
            prompt, completion = (await session.execute(repository.usage(self._row.id))).one()
            errors = [
                dict(e._mapping)
                for e in (await session.execute(repository.top_errors(self._row.id))).all()
            ]
        summary = summary_of(by_status, int(prompt), int(completion), errors)
        summary["failed"] += self._unstored_count()
        written: dict[str, Upload] = {}
        for name, succeeded in (("output", True), ("error", False)):
            if summary["completed" if succeeded else "failed"]:
                written[name] = await self._write_file(name, succeeded=succeeded)
        status, column = self._end(by_status)
        async with self._database.write() as session:
            for upload in written.values():
                await session.execute(publish_statement(upload))
            ended = repository.finish(
                self._row.id,
                self._holder,
                status,
                now_column=column,
                summary=summary,
                output_file_id=written["output"].id if "output" in written else None,
                error_file_id=written["error"].id if "error" in written else None,
            )
            if (await session.execute(ended)).one_or_none() is None:
                raise Lost
        _log.info(
            "batch_ended",
            batch_id=self._row.id,
            now=status.value,
            completed=summary["completed"],
            failed=summary["failed"],
        )

    def _end(self, by_status: Mapping[str, int]) -> tuple[BatchStatus, str]:
        if self._row.errors is not None:  # it was abandoned
            return BatchStatus.FAILED, "failed_at"
        if self._row.cancelling_at is not None:
            return BatchStatus.CANCELLED, "cancelled_at"
        if (
            by_status.get(JobStatus.EXPIRED.value)
            and self._row.expires_at <= self._row.finalizing_at
        ):
            return BatchStatus.EXPIRED, "expired_at"
        return BatchStatus.COMPLETED, "completed_at"

    async def _write_file(self, name: str, *, succeeded: bool) -> Upload:
        """The file, whole but not yet visible."""
        async with self._files.upload(
            self._row.tenant, purpose=OUTPUT_PURPOSE, max_bytes=MAX_OUTPUT_BYTES
        ) as upload:
            upload.filename = f"{self._row.id}_{name}.jsonl"
            if self._row.output_expires_seconds is not None:
                upload.expires_seconds = self._row.output_expires_seconds
            after = 0
            while True:
                async with self._turn():
                    async with self._database.read() as session:
                        statement = repository.results(
                            self._row.id, succeeded=succeeded, after_line=after
                        )
                        page = (await session.execute(statement)).all()
                    if not page:
                        break
                    after = page[-1].batch_line
                    await upload.write(b"".join(await asyncio.to_thread(_lines_of, page)))
                await self._move(BatchStatus.FINALIZING)
            if not succeeded:
                async for lines in self._unstored():
                    await upload.write(b"".join(lines))
                    await self._move(BatchStatus.FINALIZING)
            return upload

    async def _unstored(self) -> AsyncIterator[list[bytes]]:
        """Lines of the error file for those of the input that never became jobs, some at a time;
        none if it is unreadable.
        """
        if not self._unstored_count():
            return
        error = (
            self._row.errors[0]
            if self._row.errors
            else {"code": "batch_cancelled", "message": "the batch was cancelled"}
        )
        seen = 0
        try:
            async for lines in self._chunks():
                made = []
                for number, raw in lines:
                    line = parse_line(number, raw, self._row.endpoint)
                    seen += line is not None
                    if line is not None and seen > self._row.stored:
                        made.append(unstored_line(self._row.id, line, error))
                yield made
        except (VDiffError, ContentMissing) as exc:
            _log.warning("batch_input_unreadable", batch_id=self._row.id, error=type(exc).__name__)


def _lines_of(rows: Sequence[Row[Any]]) -> list[bytes]:
    return [output_line(row._mapping) for row in rows]
