"""Batches as requests see them: created, looked at, cancelled, retried. What takes long is the
caretaker's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from shared.batches import repository
from shared.batches.views import batch_object
from shared.db.session import AsyncDatabase
from shared.errors import Conflict, IdempotencyMismatch, InvalidParameter, NotFound, TooManyRequests
from shared.files import repository as files
from shared.files.service import FileNotFound
from shared.ids import may_be_an_id, new_id
from shared.jobs.limits import refuse_beyond
from shared.jobs.service import RETRY_WINDOW_SECONDS, JobService
from shared.jobs.status import Priority
from shared.keys.principal import Principal

RETRY_CHUNK = 1_000  # lines that one transaction retries
RETRY_LEASE_SECONDS = 60.0  # that a batch is held for the next chunk

_log = structlog.get_logger(__name__)


class BatchNotFound(NotFound):
    code = "batch_not_found"


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A request for a batch, its fields checked."""

    principal: Principal
    input_file_id: str
    endpoint: str
    completion_window: str
    window_seconds: float
    metadata: Mapping[str, str] | None
    output_expires_seconds: float | None
    idempotency_key: str | None = None
    automatic_retry: bool = False

    def hash(self) -> str:
        whole = [
            self.input_file_id,
            self.endpoint,
            self.completion_window,
            self.metadata,
            self.output_expires_seconds,
        ]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


class BatchService:
    """One per API process. `wake` is set when the caretaker has something to do."""

    def __init__(
        self,
        database: AsyncDatabase,
        wake: asyncio.Event,
        jobs: JobService,
        lists: AsyncDatabase | None = None,
    ) -> None:
        self._database = database
        self._lists = lists or database
        self._jobs = jobs
        self._wake = wake

    async def create(self, new: NewBatch) -> Row[Any]:
        """Raises FileNotFound, InvalidParameter (not a file of requests), IdempotencyMismatch."""
        tenant = new.principal.tenant
        if (found := await self._earlier(new)) is not None:
            return found
        limits = new.principal.limits
        values = {
            "id": new_id("batch"),
            "tenant": tenant,
            "key_id": new.principal.payer,
            "endpoint": new.endpoint,
            "input_file_id": new.input_file_id,
            "completion_window": new.completion_window,
            "metadata": None if new.metadata is None else dict(new.metadata),
            "output_expires_seconds": new.output_expires_seconds,
            "limits": {"queued_jobs": limits.queued_jobs, "queued_tokens": limits.queued_tokens},
            "idempotency_key": new.principal.scoped(new.idempotency_key),
            "request_hash": new.hash(),
        }
        async with self._database.write() as session:
            file = None
            if may_be_an_id(new.input_file_id):
                file = (
                    await session.execute(files.get_locked(new.input_file_id, tenant))
                ).one_or_none()
            if file is None:
                raise FileNotFound(f"no file {new.input_file_id[:80]!r}", param="input_file_id")
            if file.purpose != "batch":
                message = f"{file.id} was uploaded for {file.purpose}; a batch reads a file of purpose batch"
                raise InvalidParameter(message, param="input_file_id")
            row = (
                await session.execute(repository.create(values, new.window_seconds))
            ).one_or_none()
        if row is None:
            found = await self._earlier(new)
            if found is None:
                raise Conflict("the Idempotency-Key is being used by another request; try again")
            return found
        self._wake.set()
        return row

    async def _earlier(self, new: NewBatch) -> Row[Any] | None:
        tenant = new.principal.tenant
        if new.idempotency_key is not None:
            statement = repository.by_idempotency_key(
                tenant, new.principal.scoped(new.idempotency_key) or ""
            )
        elif new.automatic_retry:
            statement = repository.same_request(
                tenant, new.principal.payer, new.hash(), RETRY_WINDOW_SECONDS
            )
        else:
            return None
        async with self._database.read() as session:
            row: Row[Any] | None = (await session.execute(statement)).one_or_none()
        if row is not None and row.request_hash != new.hash():
            message = f"this Idempotency-Key was used with another body, for batch {row.id}"
            raise IdempotencyMismatch(message, param="Idempotency-Key")
        return row

    async def get(self, batch_id: str, tenant: str) -> Row[Any]:
        """Raises BatchNotFound."""
        if may_be_an_id(batch_id):
            async with self._database.read() as session:
                row: Row[Any] | None = (
                    await session.execute(repository.get(batch_id, tenant))
                ).one_or_none()
            if row is not None:
                return row
        raise BatchNotFound(f"no batch {batch_id[:80]!r}", param="batch_id")

    async def show(self, row: Row[Any]) -> dict[str, Any]:
        """The batch object with live counts."""
        if row.summary is not None or row.total is None:
            return batch_object(row, {})
        async with self._lists.read() as session:
            found = (await session.execute(repository.counts(row.id))).all()
        return batch_object(row, {status: count for status, count in found})

    async def show_many(self, rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
        """The batch objects with live counts, which are one query for all of them."""
        counts: dict[str, dict[str, int]] = {
            row.id: {} for row in rows if row.summary is None and row.total is not None
        }
        if counts:
            async with self._database.read() as session:
                for batch_id, status, count in await session.execute(
                    repository.counts_of(list(counts))
                ):
                    counts[batch_id][status] = count
        return [batch_object(row, counts.get(row.id, {})) for row in rows]

    async def read_many(
        self, keys: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """The batch objects of these (id, tenant); a batch that is not there is left out. Two
        queries.
        """
        async with self._database.read() as session:
            rows = (
                await session.execute(repository.get_many([batch_id for batch_id, _ in keys]))
            ).all()
        wanted = set(keys)
        mine = [row for row in rows if (row.id, row.tenant) in wanted]
        return {
            (row.id, row.tenant): shown
            for row, shown in zip(mine, await self.show_many(mine), strict=True)
        }

    async def page(self, tenant: str, *, after: str | None, limit: int) -> list[Row[Any]]:
        async with self._lists.read() as session:
            statement = repository.list_batches(tenant, after=after, limit=limit)
            return list((await session.execute(statement)).all())

    async def items(self, batch_id: str, tenant: str, **query: Any) -> list[Row[Any]]:
        """Raises BatchNotFound."""
        await self.get(batch_id, tenant)
        async with self._lists.read() as session:
            return list((await session.execute(repository.items(batch_id, **query))).all())

    async def item(self, batch_id: str, tenant: str, line: int) -> Row[Any]:
        """One line with its result. Raises BatchNotFound, NotFound."""
        await self.get(batch_id, tenant)
        async with self._database.read() as session:
            row: Row[Any] | None = (
                await session.execute(repository.item(batch_id, line))
            ).one_or_none()
        if row is None:
            raise NotFound(f"line {line} of the batch is no job", param="line")
        return row

    async def cancel(self, batch_id: str, tenant: str) -> Row[Any]:
        """Ask for an end; what is over stays as it is. Raises BatchNotFound."""
        await self.get(batch_id, tenant)
        async with self._database.write() as session:
            await session.execute(repository.request_cancel(batch_id))
        self._wake.set()
        return await self.get(batch_id, tenant)

    async def retry_failed(self, batch_id: str, principal: Principal) -> tuple[Row[Any], int]:
        """Give every line that did not succeed another life; return the batch and how many lines.

        Lines are retried in chunks, each a transaction. A call that breaks off has retried some of
        them, and the same call retries the others.

        Raises:
            BatchNotFound.
            Conflict: no line ever became a job, or the batch is being closed or was cancelled
                meanwhile.
            TooManyRequests: the key may not queue so many.
            LockTimeout.
        """
        row = await self.get(batch_id, principal.tenant)
        holder = new_id("holder")
        retried = 0
        after: int | None = 0
        try:
            while after is not None:  # each round is behind the last line of the one before
                count, after = await self._retry_chunk(
                    row, principal, holder, after=after, retried=retried
                )
                retried += count
                await self._jobs.announce(row.model, Priority.BULK)
        finally:
            await self._let_go(batch_id, holder)
        return await self.get(batch_id, principal.tenant), retried

    async def _retry_chunk(
        self, row: Row[Any], principal: Principal, holder: str, *, after: int, retried: int
    ) -> tuple[int, int | None]:
        """Retry the next lines after a line, in one transaction; return how many, and the last of
        them if there may be more.
        """
        who = (principal.tenant, principal.payer)
        async with self._jobs.queue_writes.write(who) as session:
            statement = repository.reopen(row.id, holder, lease_seconds=RETRY_LEASE_SECONDS)
            expires_at = (await session.execute(statement)).scalar_one_or_none()
            if expires_at is None:
                raise await self._not_retriable(row, retried)
            if not after:
                # All of them or none, as far as can be known now: others may fill the queue between
                # two chunks.
                whole = (await session.execute(repository.to_retry(row.id))).one()
                if not whole.lines:
                    raise Conflict("no line of the batch failed", code="nothing_to_retry")
                await refuse_beyond(
                    session, who, principal.limits, jobs=whole.lines, tokens=whole.tokens
                )
            chunk: Row[Any] = (
                await session.execute(repository.to_retry(row.id, after=after, limit=RETRY_CHUNK))
            ).one()
            if after and chunk.lines:
                try:
                    await refuse_beyond(
                        session, who, principal.limits, jobs=chunk.lines, tokens=chunk.tokens
                    )
                except TooManyRequests as exc:
                    message = f"{retried} lines were queued again; of the others: {exc.message}"
                    raise TooManyRequests(message) from exc
            if not chunk.lines:
                return 0, None
            lines = repository.retry_lines(
                row.id, expires_at, key_id=principal.payer, after=after, last=chunk.last
            )
            count = len((await session.execute(lines)).all())
        return count, chunk.last if chunk.lines == RETRY_CHUNK else None

    async def _not_retriable(self, row: Row[Any], retried: int) -> Conflict:
        row = await self.get(row.id, row.tenant)
        message = f"the batch is {row.status}; lines are retried while it is in progress or once it is over"
        if row.total is None:
            message = f"the batch is {row.status}, and none of its lines has been accepted"
        if retried:
            message = f"{retried} lines were queued again; now {message}"
        return Conflict(message, code="batch_not_retriable")

    async def _let_go(self, batch_id: str, holder: str) -> None:
        """Let caretakers close the batch when its lines are over; if this fails, they do so once
        the lease runs out.
        """
        try:
            async with self._database.write() as session:
                await session.execute(repository.release(batch_id, holder, for_seconds=0.0))
        except (SQLAlchemyError, OSError) as exc:
            _log.warning("batch_not_released", batch_id=batch_id, error=type(exc).__name__)
        self._wake.set()
