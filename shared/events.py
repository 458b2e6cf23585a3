"""Progress events over Redis: a bounded, expiring stream per job, and pub/sub channels that say
where to look.

    vdiff:events:{job_id}   stream; fields t (type) and d (JSON)
        started   {attempt, worker_id}
        progress  {attempt, index, step, tokens_committed, tokens_total, offset, text, canvas...}
                  text is append-only
        denoise   {attempt, index, step, positions, tokens, texts, confidence}
        done      {status}                     only after the row is committed
    vdiff:moved             channel; ids of jobs that have new events, separated by spaces
    vdiff:done              channel; a job id, right after its `done`
    vdiff:cancel            channel; a job id whose row asks its worker to stop it

All of it is a hint: Redis may lose any of these, and anybody may write there. The end of a job
always comes from PostgreSQL. The worker writes through `worker.relay`; the API waits through
`shared.watch` and reads through `EventReader`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio
import structlog
from redis.exceptions import RedisError, ResponseError

from shared.stream_bounds import StreamBounds

DONE_CHANNEL = "vdiff:done"
MOVED_CHANNEL = "vdiff:moved"
CANCEL_CHANNEL = "vdiff:cancel"
FIRST = "0-0"  # the `last_id` of a reader that has seen nothing

READ_BLOCK_MS_MAX = 4_000  # redis-py 8 times a blocking read out after 5 s
PAGE = 32  # events of one stream that one read gives
READS_MAX = 32  # streams of one round trip
GATHER_SECONDS = 0.002  # readers that the same message woke share a round trip

STREAM_BYTES = 2 << 20
TENANT_BYTES = 64 << 20

_log = structlog.get_logger(__name__)
Item = tuple[str, str, dict[str, Any]]  # id, type, data


@dataclass(frozen=True, slots=True)
class Event:
    """One event on its way to a job's stream."""

    job_id: str
    type: str
    data: dict[str, Any]
    tenant: str = ""  # of `started`: whose room the stream takes


def events_key(job_id: str) -> str:
    return f"vdiff:events:{job_id}"


def left_key(job_id: str) -> str:
    """Says that the client of a sync request left before it had its answer."""
    return f"vdiff:left:{job_id}"


class EventPublisher:
    """The worker's side: writes batches of events, one round trip each.

    Args:
        stream_length, stream_bytes: what one stream keeps, whichever is less.
        tenant_bytes: what all streams of one tenant keep.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        stream_length: int,
        stream_seconds: int,
        stream_bytes: int = STREAM_BYTES,
        tenant_bytes: int = TENANT_BYTES,
    ) -> None:
        self._client = client
        self._length = stream_length
        self._seconds = stream_seconds
        self._bounds = StreamBounds(
            stream_bytes=stream_bytes, tenant_bytes=tenant_bytes, seconds=stream_seconds
        )

    def publish(self, events: Iterable[Event]) -> None:
        """Append the events to their streams; `done` is announced on its channel too.

        Raises:
            redis.RedisError: Redis is away; nothing or a part was written.
        """
        events = list(events)
        if not events:
            return
        over = {event.job_id for event in events if event.type == "done"}
        moved = list(dict.fromkeys(event.job_id for event in events))
        pipe: Any = self._client.pipeline(transaction=False)
        accounts = 0
        if self._bounds.has_room(self._client):
            for event in events:
                self._bounds.note_tenant(event.job_id, event.tenant)
                told = json.dumps(event.data, separators=(",", ":"), ensure_ascii=False).encode(
                    "utf-8", "replace"
                )
                most = self._bounds.length(event.job_id, len(told), self._length)
                pipe.xadd(
                    events_key(event.job_id),
                    {"t": event.type, "d": told},
                    maxlen=most,
                    approximate=True,
                )
            for job_id in moved:
                pipe.expire(events_key(job_id), self._seconds)
            accounts = self._bounds.settle(pipe, set(moved), over)
        written = len(pipe)
        pipe.publish(MOVED_CHANNEL, " ".join(moved))
        for job_id in over:
            pipe.publish(DONE_CHANNEL, job_id)
        for number, answer in enumerate(pipe.execute(raise_on_error=False)):
            if isinstance(answer, Exception):
                if not written - accounts <= number < written:
                    raise answer
                self._bounds.refuse(answer)

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete the streams of those jobs. Raises redis.RedisError: they stay until they expire."""
        if job_ids:
            self._client.unlink(*map(events_key, job_ids))


async def publish_done(
    client: redis.asyncio.Redis, job_id: str, status: str, *, stream_seconds: int
) -> None:
    """`done` of a job that ended without a worker (cancelled while queued); call it after COMMIT."""
    pipe = client.pipeline(transaction=False)
    pipe.xadd(events_key(job_id), {"t": "done", "d": json.dumps({"status": status})})
    pipe.expire(events_key(job_id), stream_seconds)
    pipe.publish(DONE_CHANNEL, job_id)
    await pipe.execute()


async def publish_cancel(client: redis.asyncio.Redis, job_id: str) -> None:
    """Tell the job's worker to stop it now instead of at its next heartbeat; call it after COMMIT."""
    await client.publish(CANCEL_CHANNEL, job_id)


class EventReader:
    """The API's side of the streams: reads of all clients of a process go to Redis together, over
    one connection.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._wanted: dict[tuple[str, str], asyncio.Future[list[Item]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def read(self, job_id: str, last_id: str = FIRST) -> list[Item]:
        """Return the next events after `last_id`, at most `PAGE`; an empty list when there are none
        now.

        Raises:
            redis.RedisError: Redis is away.
        """
        future = self._wanted.get((job_id, last_id))
        if future is None:
            future = self._wanted[job_id, last_id] = asyncio.get_running_loop().create_future()
            future.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # its readers may be gone
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._read_wanted(), name="vdiff-event-reader")
        return await asyncio.shield(future)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for future in self._wanted.values():
            future.cancel()

    async def _read_wanted(self) -> None:
        while self._wanted:
            await asyncio.sleep(GATHER_SECONDS)
            keys = list(self._wanted)[:READS_MAX]
            futures = [self._wanted.pop(key) for key in keys]
            try:
                pipe = self._client.pipeline(transaction=False)
                for job_id, last_id in keys:
                    pipe.xread({events_key(job_id): last_id}, count=PAGE)
                answers = await pipe.execute(raise_on_error=False)
            except (RedisError, OSError) as exc:
                answers = [exc] * len(keys)
            except BaseException as exc:  # cancelled, or a bug: nobody may wait for ever
                for future in futures:
                    future.cancel()
                if isinstance(exc, Exception):
                    _log.exception("events_not_read")
                    continue
                raise
            for future, answer in zip(futures, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
                    answer = None  # somebody's key of this name is no stream
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(entries_of(answer))


def entries_of(answer: Any) -> list[Item]:
    """Parse the answer to an XREAD of one stream, leaving out what no worker of ours wrote."""
    if not answer:
        return []
    streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer]
    return [_decode(entry_id, fields) for entries in streams for entry_id, fields in _flat(entries)]


def _flat(entries: Any) -> list[tuple[Any, Any]]:
    """RESP3 answers wrap a stream's entries in one more list than RESP2."""
    if entries and isinstance(entries[0], list):
        return [entry for group in entries for entry in group]
    return list(entries)


def as_text(value: str | bytes) -> str:
    """Return text of Redis; bytes that are no UTF-8 match no id and no channel."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _decode(entry_id: str | bytes, fields: dict[Any, Any]) -> Item:
    """Parse one entry; one that no worker of ours can have written becomes `IGNORED`."""
    try:
        values = {as_text(k): as_text(v) for k, v in fields.items()}
        kind, data = values["t"], json.loads(values["d"])
        if kind in _SHAPES and all(
            isinstance(data.get(name), wanted) for name, wanted in _SHAPES[kind].items()
        ):
            return as_text(entry_id), kind, data
    except (KeyError, ValueError, AttributeError, RecursionError):
        pass
    return as_text(entry_id), IGNORED, {}


IGNORED = "ignored"
_STEP: dict[str, Any] = {"attempt": int, "index": int, "step": int}
_SHAPES: dict[str, dict[str, Any]] = {
    "started": {"attempt": int, "worker_id": str},
    "progress": {**_STEP, "tokens_committed": int, "tokens_total": int, "offset": int, "text": str},
    "denoise": {**_STEP, "positions": list, "tokens": list, "confidence": list},
    "done": {"status": str},
}
