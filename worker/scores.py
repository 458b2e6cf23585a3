"""The scores of one job, as one handle: many requests of the engine, which shares its steps among
them and everybody else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shared.diffusion_params import DiffusionParams
from shared.errors import VDiffError
from shared.jobs.tasks import ScoreTask
from shared.sampling_params import SamplingParams
from worker.engine.likelihood import LogLikelihood
from worker.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, StepEvent

if TYPE_CHECKING:
    from worker.work import Engine, Handle


@dataclass(frozen=True, slots=True)
class ScoresOutput(RequestOutput):
    """All of them. The lists go by pair; None where there is nothing to score, or nothing was to be
    written.
    """

    scores: list[LogLikelihood | None] = field(default_factory=list)
    generated: list[CompletionOutput | None] = field(default_factory=list)
    end_token_ids: tuple[int, ...] = ()


class Scores:
    """Some pairs at a time are in the engine, as many as it runs at once: what waits there holds
    its draws in memory, and stands in front of everybody else's requests.

    Args:
        listener: told how far the job is after each step, in scored tokens.
    """

    def __init__(
        self,
        engine: Engine,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        task: ScoreTask,
        *,
        priority: int,
        listener: Callable[[StepEvent], None],
    ) -> None:
        self._engine, self._request_id, self._ids = engine, request_id, ids
        self._params, self._task, self._priority, self._listener = params, task, priority, listener
        self._left = enumerate(task.pieces(ids))
        self._forwards: dict[str, int] = {}
        self._running: deque[tuple[Handle | None, Handle | None]] = deque()
        self._scored: list[RequestOutput | None] = []
        self._written: list[RequestOutput | None] = []
        self._aborted = False
        self._lock = threading.Lock()

    def _fill(self) -> None:
        """Raises what the engine raises."""
        with self._lock:
            while not self._aborted and len(self._running) < self._engine.card.max_num_seqs:
                following = next(self._left, None)
                if following is None:
                    return
                self._submit(*following)

    def _submit(self, i: int, pair: tuple[list[int], list[int]]) -> None:
        (context, target), task, name = pair, self._task, f"{self._request_id}/{i}"
        scored = written = None
        if target:
            scored = self._engine.submit_score(
                name,
                context,
                target,
                method=task.method,
                mc_num=task.mc_num,
                seed=self._params.seed or 0,
                cfg_scale=task.cfg_scale,
                top=task.top,
                priority=self._priority,
                listener=self._listen,
            )
            self._running.append((scored, None))  # known to `abort`, whatever comes next
        if task.generate:
            # End tokens too: there is a log-probability for each token that was asked for.
            one = replace(
                self._params, max_tokens=1, ignore_eos=True, diffusion=DiffusionParams(cache="none")
            )
            written = self._engine.submit(
                f"{name}/next",
                context + target,
                one,
                priority=self._priority,
                listener=self._listen,
            )
        if scored is not None:
            self._running.pop()
        self._running.append((scored, written))

    def _listen(self, event: StepEvent) -> None:
        """In the engine's thread."""
        self._forwards[event.request_id] = event.forwards
        done = sum(self._forwards.values())
        total = self._params.max_tokens
        self._listener(
            StepEvent(
                request_id=self._request_id,
                index=0,
                step=done,
                forwards=done,
                positions=(),
                token_ids=(),
                confidences=(),
                text_delta="",
                tokens_committed=total * done // max(self._task.forwards, 1),
                tokens_total=total,
            )
        )

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            handles = [h for pair in self._running for h in pair if h is not None]
        for handle in handles:
            handle.abort()

    def result(self, timeout: float | None = None) -> ScoresOutput:
        """All results, once the last is there; after an abort those that there are. May be called
        again after a TimeoutError.

        Raises:
            TimeoutError: not done within `timeout` seconds.
            VDiffError: what ended one of them; the others are aborted.
        """
        until = None if timeout is None else time.monotonic() + timeout

        def get(handle: Handle | None) -> RequestOutput | None:
            if handle is None:
                return None
            return handle.result(None if until is None else max(0.0, until - time.monotonic()))

        try:
            self._fill()
            while self._running:
                scored, written = (get(handle) for handle in self._running[0])
                self._scored.append(scored)
                self._written.append(written)
                with self._lock:
                    self._running.popleft()
                self._fill()
        except VDiffError:
            self.abort()
            raise
        return self._output()

    def _output(self) -> ScoresOutput:
        parts = [part for part in (*self._scored, *self._written) if part is not None]
        return ScoresOutput(
            self._request_id,
            None,
            self._ids,
            [],
            not self._aborted,
            # A score writes nothing; the one token after an echo is counted in its usage.
            replace(
                together([part.metrics for part in parts], len(self._ids)),
                generated_tokens=0,
                tokens_per_forward=0.0,
            ),
            self._params.seed or 0,
            scores=[None if part is None else part.likelihood for part in self._scored],
            generated=[None if part is None else part.outputs[0] for part in self._written],
            end_token_ids=self._engine.card.end_token_ids,
        )


def together(metrics: list[RequestMetrics], prompt_tokens: int) -> RequestMetrics:
    """Combine several requests: from the first arrival to the last end; counts are added up."""
    now = time.time()

    def first(name: str) -> float | None:
        known = [value for m in metrics if (value := getattr(m, name)) is not None]
        return min(known) if known else None

    generated, forwards = (
        sum(getattr(m, name) for m in metrics) for name in ("generated_tokens", "forwards")
    )
    accepted = [(m.acceptance_rate, m.forwards) for m in metrics if m.acceptance_rate is not None]
    weight = sum(of for _, of in accepted)
    return RequestMetrics(
        arrival_time=first("arrival_time") or now,
        first_scheduled_time=first("first_scheduled_time"),
        first_token_time=first("first_token_time"),
        finished_time=max((m.finished_time for m in metrics), default=now),
        prompt_tokens=prompt_tokens,
        generated_tokens=generated,
        forwards=forwards,
        tokens_per_forward=generated / forwards if forwards else 0.0,
        prompt_done_time=first("prompt_done_time"),
        acceptance_rate=sum(rate * of for rate, of in accepted) / weight if weight else None,
        cache_refreshes=sum(m.cache_refreshes for m in metrics),
        prefill_forwards=sum(m.prefill_forwards for m in metrics),
        verifier_seconds=sum(m.verifier_seconds for m in metrics),
        device_seconds=sum(m.device_seconds for m in metrics),
    )
