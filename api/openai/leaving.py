"""Clients that leave a sync request: its job is cancelled, unless somebody else waits for it.

An SDK that gave up sends the same request again within a second, and that one attaches to the job
(`shared.jobs.service`), here or in another API process. So a job that an SDK left is mourned for a
moment first; then every API process is asked whether anybody waits for it: such a request, a long
poll, or who follows its events. Only when all say no it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import structlog
from fastapi import Request
from fastapi.sse import EventSourceResponse
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from api.dependencies import Context
from api.followers import Place
from shared.events import left_key
from shared.jobs.service import RETRY_WINDOW_SECONDS
from shared.jobs.status import JobStatus

SDK_GRACE_SECONDS = 2.0  # its second and last retry by default comes within one

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stay:
    """One request at one job."""

    context: Context
    job_id: str
    tenant: str
    created: bool  # the job is of this request
    cancels: bool  # nobody can come back for the answer but by an SDK's retry
    grace_seconds: float

    def leave(self) -> None:
        """The client is gone."""
        if self.cancels:
            self.context.spawn(self._leave())

    async def _leave(self) -> None:
        context = self.context
        if self.grace_seconds:
            with suppress(RedisError, OSError):  # a retry that finds no mark may pay twice
                await context.redis.set(left_key(self.job_id), "1", ex=RETRY_WINDOW_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(context.stopping.wait(), self.grace_seconds)
        waited_for = await context.waiter.waits_anywhere(self.job_id)
        if waited_for is None:  # an SDK may have come back elsewhere; better a job too many
            waited_for = not self.created or bool(self.grace_seconds)
        if not waited_for:
            try:
                row = await context.jobs.cancel(self.job_id, self.tenant)
            except (SQLAlchemyError, OSError) as exc:
                _log.warning(
                    "not_cancelled", job_id=self.job_id, error=type(exc).__name__
                )  # it runs to its end
                return
            if row.status == JobStatus.SUCCEEDED:
                return  # the answer came as the client left: a later retry finds it by the mark
        if self.grace_seconds:
            with suppress(RedisError, OSError):
                await context.redis.delete(left_key(self.job_id))


def stay(
    request: Request, context: Context, *, job_id: str, tenant: str, created: bool, keyed: bool
) -> Stay:
    """Args: keyed: there is an idempotency key, so whoever has it may come back for the answer."""
    is_sdk = "x-stainless-retry-count" in request.headers
    return Stay(
        context,
        job_id,
        tenant,
        created,
        cancels=not keyed,
        grace_seconds=SDK_GRACE_SECONDS if is_sdk else 0.0,
    )


class StayingStream(EventSourceResponse):
    """A job's events. A client that leaves early, however early that is, leaves the job; an error
    of ours in mid-stream does not: the job goes on, and its client can come back for it.

    Args:
        staying: None for a client that only looks on.
        place: among the followers; the stream leaves it at its end.
    """

    def __init__(
        self,
        context: Context,
        job_id: str,
        events: AsyncIterator[bytes],
        staying: Stay | None,
        place: Place | None = None,
    ) -> None:
        self.over = False  # to be set when the job is
        self.place = place
        self._context, self._job, self._staying, self._broken = context, job_id, staying, False
        context.waiter.register(job_id)  # whoever follows a job waits for it
        headers = {"X-Job-Id": job_id, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._watched(events), headers=headers)

    async def _watched(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        # Looked at here, because further out an OSError of a database looks like that of a closed
        # connection.
        try:
            async for event in events:
                yield event
        except Exception:
            self._broken = True
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._context.waiter.forget(self._job)
            if self.place is not None:
                self.place.leave()
            left = not (self.over or self._broken or self._context.stopping.is_set())
            if self._staying is not None and left:
                self._staying.leave()
