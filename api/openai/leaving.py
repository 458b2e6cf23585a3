"""Clients that leave a sync request: its job is cancelled, unless somebody else waits for it.

An SDK that gave up sends the same request again within a second, and that one attaches to the job (`shared.jobs.service`), here
or in another API process. So a request of an SDK is mourned for a moment first, and whoever attached last decides: it
leaves its mark in Redis, and only a request that is not superseded cancels.
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

SDK_GRACE_SECONDS = 2.0  # its second and last retry by default comes within one
MARK_SECONDS = 600

_log = structlog.get_logger(__name__)


def attached_key(job_id: str) -> str:
    return f"vdiff:attached:{job_id}"


@dataclass(frozen=True, slots=True)
class Stay:
    """One request at one job."""

    context: Context
    job_id: str
    tenant: str
    token: str  # of the request; the id of the job that it would have made
    created: bool  # the job is of this request
    cancels: bool  # nobody can come back for the answer but by an SDK's retry
    grace_seconds: float

    async def begin(self) -> None:
        """Say that this request now waits for a job that another one made."""
        if self.created or not self.cancels:
            return
        try:
            await self.context.redis.set(attached_key(self.job_id), self.token, ex=MARK_SECONDS)
        except (RedisError, OSError) as exc:
            _log.warning("attach_not_marked", job_id=self.job_id, error=type(exc).__name__)

    def leave(self) -> None:
        """The client is gone."""
        if self.cancels:
            self.context.spawn(self._leave())

    def over(self) -> None:
        """The job is over: whoever leaves now cancels nothing, and the mark has no use any more."""
        if self.cancels and not self.created:
            self.context.spawn(self._unmark())

    async def _unmark(self) -> None:
        with suppress(RedisError, OSError):  # it goes by itself after MARK_SECONDS
            await self.context.redis.delete(attached_key(self.job_id))

    async def _leave(self) -> None:
        context = self.context
        if self.grace_seconds:
            with suppress(TimeoutError):
                await asyncio.wait_for(context.stopping.wait(), self.grace_seconds)
        if context.waiter.waits(self.job_id) or not await self._is_last():
            return
        try:
            await context.jobs.cancel(self.job_id, self.tenant)
        except (SQLAlchemyError, OSError) as exc:
            _log.warning("not_cancelled", job_id=self.job_id, error=type(exc).__name__)  # it runs to its end

    async def _is_last(self) -> bool:
        try:
            mark = await self.context.redis.get(attached_key(self.job_id))
        except (RedisError, OSError):
            return self.created and not self.grace_seconds  # an SDK may have come back; better a job too many
        return self.created if mark is None else mark in (self.token, self.token.encode())


def stay(
    request: Request, context: Context, *, job_id: str, tenant: str, token: str, created: bool, keyed: bool
) -> Stay:
    """Args: keyed: there is an idempotency key, so whoever has it may come back for the answer."""
    is_sdk = "x-stainless-retry-count" in request.headers
    return Stay(
        context, job_id, tenant, token, created, cancels=not keyed, grace_seconds=SDK_GRACE_SECONDS if is_sdk else 0.0
    )


class StayingStream(EventSourceResponse):
    """A job's events. A client that leaves early, however early that is, leaves the job; an error of ours in mid-stream does
    not: the job goes on, and its client can come back for it.

    Args:
        staying: None for who only looks on.
    """

    def __init__(self, context: Context, job_id: str, events: AsyncIterator[bytes], staying: Stay | None) -> None:
        self.over = False  # to be set when the job is
        self._context, self._staying, self._broken = context, staying, False
        headers = {"X-Job-Id": job_id, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._watched(events), headers=headers)

    async def _watched(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        # Looked at here, because further out an OSError of a database looks like that of a closed connection.
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
            left = not (self.over or self._broken or self._context.stopping.is_set())
            if self._staying is not None and left:
                self._staying.leave()
            elif self._staying is not None and self.over:
                self._staying.over()
