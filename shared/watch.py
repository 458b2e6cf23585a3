"""One watch per API process over every job that a client of it waits for or follows.

It holds one Redis connection for its subscription and runs one batched query for all watched jobs,
however many there are:

    vdiff:done      a job ended            wakes the watches of that job
    vdiff:moved     jobs have new events   wakes the watches of those jobs
    every round     `read_over` says which of the watched jobs are over, as Redis may lose any
                                           message

A watch that is woken only looks: a stream is read through `shared.events.EventReader`, the end of a
job comes from its row. A wake-up sets a flag and never waits, so a client that reads slowly holds
up nobody and is owed nothing but that flag.

The watch also answers other API processes that ask whether anybody waits for a job
(`waits_anywhere`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import redis.asyncio
from redis.exceptions import RedisError

from shared.background import Duty, OnGone, watch_task
from shared.events import DONE_CHANNEL, MOVED_CHANNEL, READ_BLOCK_MS_MAX, as_text
from shared.ids import new_id
from shared.metrics import API_DUTY_FAILURES

ASK_CHANNEL = "vdiff:who-waits"
ASK_SECONDS = 2.0  # for the answers of all API processes
REREAD_SECONDS = 1.5  # how late a lost `done` may be noticed
REREAD_CHUNK = 1_000  # jobs of one query
ANSWERING_MAX = (
    256  # questions that are being answered; further ones are not, which says "cannot be told"
)
_REPLIES = "vdiff:who-waits-replies:"
_ANSWER_LIST_SECONDS = 20
_RECONNECT_SECONDS = 0.5

Row = TypeVar("Row")
ReadOver = Callable[[Sequence[str]], Awaitable[Sequence[str]]]


class Watch:
    """One client's view of one job. Clear it, then look; what happens after that wakes it again."""

    __slots__ = ("_event", "_told_end")

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._told_end = False

    def wake(self, *, end: bool = False) -> None:
        self._told_end = self._told_end or end
        self._event.set()

    def clear(self) -> bool:
        """Forget earlier wake-ups; return whether one of them said that the job is over."""
        told, self._told_end = self._told_end, False
        self._event.clear()
        return told

    async def wait(self, seconds: float) -> bool:
        """Return whether it was woken within so many seconds."""
        if self._event.is_set():
            return True
        try:
            await asyncio.wait_for(self._event.wait(), max(0.0, seconds))
        except TimeoutError:
            return False
        return True


class JobWatch:
    """Wakes the clients of this process that wait for jobs.

    Args:
        read_over: returns those of the given jobs that are over or gone; one query.
    """

    def __init__(self, client: redis.asyncio.Redis, read_over: ReadOver) -> None:
        self._client = client
        self._read_over = read_over
        self._waiting: dict[str, int] = {}  # how many clients wait for it, with or without a watch
        self._watches: dict[str, set[Watch]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._answering: set[asyncio.Task[None]] = set()
        self._replies = f"{_REPLIES}{new_id('api')}"
        self._questions: dict[str, asyncio.Queue[str]] = {}
        self._hearing = Duty(
            "hear_done", lambda: None, every=_RECONNECT_SECONDS, failures=API_DUTY_FAILURES
        )
        self._rereading = Duty(
            "reread_watched", lambda: None, every=REREAD_SECONDS, failures=API_DUTY_FAILURES
        )
        self._again = asyncio.Event()  # a round of `_reread` is due now

    def start(self, on_gone: OnGone = lambda reason: None) -> None:
        """Args: on_gone: told when one of the tasks ends although nobody stopped it."""
        self._tasks = [
            asyncio.create_task(self._listen(), name="vdiff-watch"),
            asyncio.create_task(self._reread(), name="vdiff-watch-reread"),
        ]
        for task in self._tasks:
            watch_task(task, on_gone)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._answering, return_exceptions=True)
        self._tasks = []

    def register(self, job_id: str) -> None:
        """Count a client that waits for the job. Register it before the job can end, and `forget`
        it afterwards.
        """
        self._waiting[job_id] = self._waiting.get(job_id, 0) + 1

    def forget(self, job_id: str) -> None:
        count = self._waiting.pop(job_id, 0) - 1
        if count > 0:
            self._waiting[job_id] = count

    def waits(self, job_id: str) -> bool:
        """Return whether a client of this process waits for the job."""
        return job_id in self._waiting

    @contextmanager
    def watching(self, job_id: str) -> Iterator[Watch]:
        """Watch the job. Read its row or stream only after this began, else an end in between is
        missed.
        """
        watch = Watch()
        self.register(job_id)
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            self.forget(job_id)
            watches = self._watches[job_id]
            watches.discard(watch)
            if not watches:
                del self._watches[job_id]

    async def wait_for(
        self,
        job_id: str,
        read_row: Callable[[], Awaitable[Row]],
        *,
        is_done: Callable[[Row], bool],
        timeout_seconds: float,
    ) -> Row:
        """Return the job's row once `is_done` says so, or as it is when the time is up.

        The row is read once, and again after each wake-up: a message that anybody may have sent
        decides nothing.
        """
        deadline = time.monotonic() + timeout_seconds
        with self.watching(job_id) as watch:
            while True:
                watch.clear()
                row = await read_row()
                remaining = deadline - time.monotonic()
                if is_done(row) or remaining <= 0:
                    return row
                await watch.wait(remaining)

    def wake_everybody(self) -> None:
        """Let every watch look: the process is about to stop, or messages were lost."""
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()

    def _wake(self, job_id: str, *, end: bool) -> None:
        for watch in self._watches.get(job_id, ()):
            watch.wake(end=end)

    # What Redis loses

    async def _reread(self) -> None:
        pause = REREAD_SECONDS
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._again.wait(), pause)
            self._again.clear()
            try:
                await self.look()
            except Exception as exc:  # this duty outlives every error: waits depend on it
                pause = self._rereading.failed(exc)
            else:
                pause = REREAD_SECONDS
                self._rereading.succeeded()

    async def look(self) -> None:
        """One round: wake the watches of jobs that are over. Raises SQLAlchemyError, OSError."""
        job_ids = list(self._watches)
        for start in range(0, len(job_ids), REREAD_CHUNK):
            for job_id in await self._read_over(job_ids[start : start + REREAD_CHUNK]):
                self._wake(job_id, end=True)

    # What Redis says

    async def _listen(self) -> None:
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(
                        DONE_CHANNEL, MOVED_CHANNEL, ASK_CHANNEL, self._replies
                    )
                    # What was published while the subscription was away is lost.
                    self._again.set()
                    self.wake_everybody()
                    self._hearing.succeeded()
                    while True:
                        message = await subscription.get_message(timeout=READ_BLOCK_MS_MAX / 1000)
                        if message is not None:
                            self._hear(as_text(message["channel"]), as_text(message["data"]))
            except Exception as exc:
                await asyncio.sleep(self._hearing.failed(exc))

    def _hear(self, channel: str, data: str) -> None:
        if channel == DONE_CHANNEL:
            self._wake(data, end=True)
        elif channel == MOVED_CHANNEL:
            for job_id in data.split(" "):
                self._wake(job_id, end=False)
        elif channel == self._replies:
            nonce, _, answer = data.partition(" ")
            if (queue := self._questions.get(nonce)) is not None:
                queue.put_nowait(answer)
        elif len(self._answering) < ANSWERING_MAX:
            task = asyncio.create_task(self._answer(data))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    # Who waits

    async def waits_anywhere(self, job_id: str) -> bool | None:
        """Return whether a client of any API process waits for the job; None when that cannot be
        told.

        It cannot be told while Redis is away or one of the processes is silent.
        """
        if self.waits(job_id):
            return True
        nonce = new_id("ask")
        answers = self._questions[nonce] = asyncio.Queue()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                for _ in range(
                    await self._client.publish(ASK_CHANNEL, f"{nonce} {job_id} {self._replies}")
                ):
                    answer = await answers.get()
                    if answer != "no":
                        return True if answer == "yes" else None
        except (RedisError, OSError, TimeoutError):
            return None
        finally:
            del self._questions[nonce]
        return False

    async def _answer(self, question: str) -> None:
        nonce, _, rest = question.partition(" ")
        job_id, _, replies = rest.partition(" ")
        answer = "yes" if self.waits(job_id) else "no"
        with suppress(
            RedisError, OSError
        ):  # the process that asked takes silence for "cannot be told"
            if replies.startswith(_REPLIES):
                await self._client.publish(replies, f"{nonce} {answer}")
                return
            # A process of an earlier release reads its answers from a list.
            pipe: Any = self._client.pipeline(transaction=False)
            pipe.rpush(f"{ASK_CHANNEL}:{nonce}", answer)
            pipe.expire(f"{ASK_CHANNEL}:{nonce}", _ANSWER_LIST_SECONDS)
            await pipe.execute()
