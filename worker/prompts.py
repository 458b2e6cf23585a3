"""The prompts of one job, as one handle: a request of the engine for each, beside each other."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from shared.errors import VDiffError
from shared.jobs.tasks import PromptsTask
from shared.sampling_params import SamplingParams
from worker.engine.outputs import RequestOutput, StepEvent
from worker.scores import together

if TYPE_CHECKING:
    from worker.work import Engine, Handle


class Prompts:
    """A queue of prompts: as many as the engine has slots are in it at a time, so that they do not
    block other requests.

    Every prompt is decoded with the same seed, as if it had been sent alone. Choice k of prompt i
    has index i * n + k, in the output and in what the listener is told.
    """

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        task: PromptsTask,
        *,
        priority: int,
        listener: Callable[[StepEvent], None],
    ) -> None:
        self._engine, self._request_id, self._ids = engine, request_id, ids
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._params, self._priority, self._listener = (
            params.with_seed(self._seed),
            priority,
            listener,
        )
        self._left = enumerate(task.pieces(ids))
        self._running: deque[Handle] = deque()
        self._ended: list[RequestOutput] = []
        self._aborted = False
        self._lock = threading.Lock()

    def _fill(self) -> None:
        """Raises what the engine raises."""
        with self._lock:
            while not self._aborted and len(self._running) < self._engine.card.max_num_seqs:
                following = next(self._left, None)
                if following is None:
                    return
                i, ids = following
                handle = self._engine.submit(
                    f"{self._request_id}/{i}",
                    ids,
                    self._params,
                    priority=self._priority,
                    listener=self._listen(i),
                )
                self._running.append(handle)

    def _listen(self, prompt: int) -> Callable[[StepEvent], None]:
        first = prompt * self._params.n

        def listen(event: StepEvent) -> None:
            self._listener(replace(event, request_id=self._request_id, index=first + event.index))

        return listen

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            handles = list(self._running)
        for handle in handles:
            handle.abort()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """All answers, once the last is there; after an abort those that there are. May be called
        again after a TimeoutError.

        Raises:
            TimeoutError: not done within `timeout` seconds.
            VDiffError: what ended one of them; the others are aborted.
        """
        until = None if timeout is None else time.monotonic() + timeout
        try:
            self._fill()
            while self._running:
                left = None if until is None else max(0.0, until - time.monotonic())
                self._ended.append(self._running[0].result(left))
                with self._lock:
                    self._running.popleft()
                self._fill()
        except VDiffError:
            self.abort()
            raise
        n = self._params.n
        outputs = [
            replace(one, index=i * n + one.index)
            for i, ended in enumerate(self._ended)
            for one in ended.outputs
        ]
        metrics = together([ended.metrics for ended in self._ended], len(self._ids))
        return RequestOutput(
            self._request_id, None, self._ids, outputs, not self._aborted, metrics, self._seed
        )
