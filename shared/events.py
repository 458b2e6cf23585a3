"""Progress events over Redis: a bounded, expiring stream per job, and two pub/sub channels.

    vdiff:events:{job_id}   stream; fields t (type) and d (JSON)
        started   {attempt, worker_id}
        progress  {attempt, index, step, tokens_committed, tokens_total, text, canvas?}   text is append-only
        denoise   {attempt, index, step, positions, tokens, texts, confidence}
        done      {status}                     only after the row is committed
    vdiff:done              channel; a job id, right after its `done`
    vdiff:cancel            channel; a job id whose worker should stop it

All of it is a hint: Redis may lose any of these. The end of a job always comes from PostgreSQL, which is why every wait
here re-reads the row now and then. The worker writes through `worker.relay`, the API reads through `EventReader` and
`DoneWaiter`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.exceptions import RedisError

from shared.background import Duty, OnGone, watch_task
from shared.ids import new_id
from shared.metrics import API_DUTY_FAILURES

DONE_CHANNEL = "vdiff:done"
CANCEL_CHANNEL = "vdiff:cancel"
ASK_CHANNEL = "vdiff:who-waits"
ASK_SECONDS = 2.0  # for the answers of all API processes
FIRST = "0-0"  # the `last_id` of a reader that has seen nothing

READ_BLOCK_MS_MAX = 4_000  # redis-py 8 times a blocking read out after 5 s
REREAD_SECONDS = 1.5  # how late a lost `done` may be noticed
_RECONNECT_SECONDS = 0.5

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Event:
    """One event on its way to a job's stream."""

    job_id: str
    type: str
    data: dict[str, Any]


def events_key(job_id: str) -> str:
    return f"vdiff:events:{job_id}"


def left_key(job_id: str) -> str:
    """Says that the client of a sync request left before it had its answer."""
    return f"vdiff:left:{job_id}"


def _answers_key(nonce: str) -> str:
    return f"vdiff:who-waits:{nonce}"


class EventPublisher:
    """The worker's side: writes batches of events, one round trip each."""

    def __init__(self, client: redis.Redis, *, stream_length: int, stream_seconds: int) -> None:
        self._client = client
        self._length = stream_length
        self._seconds = stream_seconds

    def publish(self, events: Iterable[Event]) -> None:
        """Append the events to their streams; `done` is announced on its channel too.

        Raises:
            redis.RedisError: Redis is away; nothing or a part was written.
        """
        pipe = self._client.pipeline(transaction=False)
        keys: set[str] = set()
        done: list[str] = []
        for event in events:
            key = events_key(event.job_id)
            fields: dict[Any, Any] = {"t": event.type, "d": json.dumps(event.data, separators=(",", ":"))}
            pipe.xadd(key, fields, maxlen=self._length, approximate=True)
            keys.add(key)
            if event.type == "done":
                done.append(event.job_id)
        if not keys:
            return
        for key in keys:
            pipe.expire(key, self._seconds)
        for job_id in done:
            pipe.publish(DONE_CHANNEL, job_id)
        pipe.execute()

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete the streams of those jobs. Raises redis.RedisError: they stay until they expire."""
        if job_ids:
            self._client.unlink(*map(events_key, job_ids))


async def publish_done(client: redis.asyncio.Redis, job_id: str, status: str, *, stream_seconds: int) -> None:
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
    """The API's side of the streams."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client

    async def read(
        self, job_id: str, last_id: str = FIRST, block_ms: int = 1_000
    ) -> list[tuple[str, str, dict[str, Any]]]:
        """The events after `last_id` as (id, type, data); waits up to `block_ms` for the first, then gives [].

        Raises:
            redis.RedisError: Redis is away.
        """
        block = max(1, min(block_ms, READ_BLOCK_MS_MAX))  # 0 would block for ever
        answer: Any = await self._client.xread({events_key(job_id): last_id}, block=block)
        if not answer:
            return []
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer]
        return [_decode(entry_id, fields) for entries in streams for entry_id, fields in _flat(entries)]


def _flat(entries: Any) -> list[tuple[Any, Any]]:
    """RESP3 answers wrap a stream's entries in one more list than RESP2."""
    if entries and isinstance(entries[0], list):
        return [entry for group in entries for entry in group]
    return list(entries)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _decode(entry_id: str | bytes, fields: dict[Any, Any]) -> tuple[str, str, dict[str, Any]]:
    values = {_text(k): _text(v) for k, v in fields.items()}
    return _text(entry_id), values["t"], json.loads(values["d"])


class DoneWaiter:
    """One subscription per API process that wakes everybody who waits for a job's end, and says to others whether anybody does.

    Register before the job is enqueued, else a fast job is done before anybody listens:

        waiter.register(job_id)
        try:
            ... commit, push ...
            row = await waiter.wait_for(job_id, read_row, timeout_seconds=30)
        finally:
            waiter.forget(job_id)
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._waiting: dict[str, tuple[asyncio.Event, int]] = {}  # how many wait for it
        self._task: asyncio.Task[None] | None = None
        self._duty = Duty("hear_done", lambda: None, every=_RECONNECT_SECONDS, failures=API_DUTY_FAILURES)
        self._answering: set[asyncio.Task[None]] = set()

    def start(self, on_gone: OnGone = lambda reason: None) -> None:
        self._task = asyncio.create_task(self._listen(), name="vdiff-done-waiter")
        watch_task(self._task, on_gone)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, *self._answering, return_exceptions=True)
            self._task = None

    def register(self, job_id: str) -> None:
        event, count = self._waiting.get(job_id) or (asyncio.Event(), 0)
        self._waiting[job_id] = (event, count + 1)

    def forget(self, job_id: str) -> None:
        entry = self._waiting.pop(job_id, None)
        if entry is not None and entry[1] > 1:
            self._waiting[job_id] = (entry[0], entry[1] - 1)

    def waits(self, job_id: str) -> bool:
        """Whether somebody here waits for it."""
        return job_id in self._waiting

    async def waits_anywhere(self, job_id: str) -> bool | None:
        """Whether somebody at any API process waits for it; None when that cannot be told: Redis is away, or one is silent."""
        if self.waits(job_id):
            return True
        nonce = new_id("ask")
        try:
            async with asyncio.timeout(ASK_SECONDS):
                for _ in range(await self._client.publish(ASK_CHANNEL, f"{nonce} {job_id}")):
                    answer: Any = await self._client.blpop([_answers_key(nonce)], timeout=ASK_SECONDS)
                    if answer is None:
                        return None
                    if _text(answer[1]) == "yes":
                        return True
        except (RedisError, OSError, TimeoutError):
            return None
        return False

    async def _answer(self, question: str) -> None:
        nonce, _, job_id = question.partition(" ")
        pipe = self._client.pipeline(transaction=False)
        pipe.rpush(_answers_key(nonce), "yes" if self.waits(job_id) else "no")
        pipe.expire(_answers_key(nonce), int(10 * ASK_SECONDS))
        with suppress(RedisError, OSError):  # who asked takes silence for "cannot be told"
            await pipe.execute()

    async def wait(self, job_id: str, timeout_seconds: float) -> bool:
        """Whether the job's `done` was heard; False only says that it was not heard in time."""
        event = self._waiting[job_id][0]
        try:
            await asyncio.wait_for(event.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    async def wait_for(
        self,
        job_id: str,
        read_row: Callable[[], Awaitable[Row]],
        *,
        is_done: Callable[[Row], bool],
        timeout_seconds: float,
        reread_seconds: float = REREAD_SECONDS,
    ) -> Row:
        """The job's row once `is_done` says so, or as it is when the time is up; for a registered job.

        The row is read when `done` is heard and every `reread_seconds` besides, as Redis may lose the message.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            remaining = deadline - time.monotonic()
            if remaining > 0:
                heard = await self.wait(job_id, min(reread_seconds, remaining))
            else:
                heard = False
            row = await read_row()
            if is_done(row) or deadline - time.monotonic() <= 0:
                return row
            if heard:
                # An older life's message, or a replica's lag: wait for the next instead of spinning.
                self._waiting[job_id][0].clear()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(DONE_CHANNEL, ASK_CHANNEL)
                    # Whatever was published while we were away is lost: make all waiters read their rows.
                    self._wake_all()
                    self._duty.succeeded()
                    while True:
                        message = await subscription.get_message(timeout=READ_BLOCK_MS_MAX / 1000)
                        if message is None:
                            continue
                        if _text(message["channel"]) == DONE_CHANNEL:
                            self._wake(_text(message["data"]))
                        else:
                            task = asyncio.create_task(self._answer(_text(message["data"])))
                            self._answering.add(task)
                            task.add_done_callback(self._answering.discard)
            except Exception as exc:
                await asyncio.sleep(self._duty.failed(exc))

    def _wake(self, job_id: str) -> None:
        entry = self._waiting.get(job_id)
        if entry is not None:
            entry[0].set()

    def _wake_all(self) -> None:
        for event, _ in self._waiting.values():
            event.set()
