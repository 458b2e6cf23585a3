"""VDiffEngine: one model, one step loop, any number of requests that join and leave between steps.

A thread makes all steps: schedule (`Scheduler`), denoise (`DiffusionSampler.diffusion_step`), then finish what ended.
`submit`, `abort` and the rest may be called from any thread. An error of one request ends that request alone; running out
of memory halves the batch before anything is given up.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from types import TracebackType
from typing import Any, overload

import torch

from shared.errors import EngineError, EngineShutDown, InvalidParameter, MissingParameter, OutOfMemory, VDiffError
from shared.ids import new_id
from shared.sampling_params import SamplingParams
from worker.engine.config import VDiffConfig
from worker.engine.loader import load
from worker.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, StepEvent
from worker.engine.request import Answer, EngineRequest, Listener, end_tokens
from worker.engine.sampler import Commit, DiffusionSampler, DiffusionSamplerConfig
from worker.engine.scheduler import Scheduler
from worker.engine.state import EngineState, EngineStats, HealthStatus
from worker.engine.stopping import advance

log = logging.getLogger(__name__)

Prompt = str | Mapping[str, Any]
Prompts = list[str] | list[dict[str, Any]] | list[Prompt] | tuple[Prompt, ...]


class RequestHandle:
    """A submitted request: wait for it, abort it."""

    def __init__(self, engine: VDiffEngine, request: EngineRequest) -> None:
        self._engine, self._request = engine, request
        self._future: Future[RequestOutput] = Future()

    @property
    def request_id(self) -> str:
        return self._request.request_id

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The output; after an abort it holds what was committed, with finish_reason "abort".

        Raises:
            TimeoutError: not finished within `timeout` seconds.
            VDiffError: what ended the request.
        """
        return self._future.result(timeout)

    def done(self) -> bool:
        return self._future.done()

    def add_done_callback(self, fn: Callable[[RequestHandle], object]) -> None:
        """Call `fn(handle)` when finished, from the engine's thread (or at once): it must be quick."""
        self._future.add_done_callback(lambda _: fn(self))

    def abort(self) -> None:
        """Ask the engine to drop the request; its slot is free within one step."""
        self._engine.abort(self.request_id)


class VDiffEngine:
    """Loads on construction; use as a context manager or call `shutdown`.

    Raises:
        ConfigurationError, ModelLoadError: from loading.
    """

    def __init__(self, config: VDiffConfig) -> None:
        self.config = config
        self._state = EngineState.LOADING
        loaded = load(config)
        self.card, self.tokenizer, self.model = loaded.card, loaded.tokenizer, loaded.model
        self.sampler = DiffusionSampler(
            self.model, self.tokenizer, DiffusionSamplerConfig(mask_id=self.card.mask_token_id)
        )
        self.stats = EngineStats()
        self.last_step_at = time.monotonic()
        self._scheduler = Scheduler(config.max_num_seqs)
        self._handles: dict[str, RequestHandle] = {}
        self._aborted: set[str] = set()
        self._changed = threading.Condition(threading.RLock())
        self._stop = False
        self._state = EngineState.READY
        self._thread = threading.Thread(target=self._loop, name="vdiff-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> VDiffEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    # Requests

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        listener: Listener | None = None,
    ) -> RequestHandle:
        """Queue a request; returns at once. Without a seed one is drawn, and reported in the output.

        Raises:
            EngineShutDown: draining or shut down.
            InvalidParameter: empty prompt, a token outside the vocabulary, prompt and answer beyond the context, or a
                request_id that is already in the engine.
        """
        ids = list(prompt_token_ids)
        if not ids:
            raise InvalidParameter("the prompt is empty", param="prompt")
        if min(ids) < 0 or max(ids) >= self.card.vocab_size:
            raise InvalidParameter(f"token ids must be from 0 to {self.card.vocab_size - 1}", param="prompt")
        if len(ids) + params.max_tokens > self.card.context_length:
            message = f"{len(ids)} prompt tokens and max_tokens {params.max_tokens} exceed {self.card.context_length}"
            raise InvalidParameter(message, param="max_tokens")
        request = EngineRequest(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            priority=priority,
            arrival_time=time.time(),
            end_token_ids=end_tokens(params, self.card.end_token_ids),
            listener=listener,
        )
        request.make_sequences(self.tokenizer, self.card.mask_token_id)
        handle = RequestHandle(self, request)
        with self._changed:
            if self._state not in (EngineState.READY, EngineState.BUSY):
                raise EngineShutDown(f"the engine is {self._state.value} and takes no requests")
            if request_id in self._handles:
                raise InvalidParameter(f"request {request_id} is already running", param="request_id")
            self._handles[request_id] = handle
            self._scheduler.add(request)
            self._changed.notify()
        return handle

    def abort(self, request_id: str) -> bool:
        """Drop a request before the next step; False when the engine does not have it."""
        with self._changed:
            if request_id not in self._handles:
                return False
            self._aborted.add(request_id)
            self._changed.notify()
            return True

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt in any of its forms: a string, or {prompt | prompt_token_ids | messages}."""
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        if prompt.get("messages") is not None:
            text = self.tokenizer.apply_chat_template(prompt["messages"])
            return text, self.tokenizer.encode(text)
        if prompt.get("prompt_token_ids") is not None:
            return None, list(prompt["prompt_token_ids"])
        if prompt.get("prompt") is not None:
            return prompt["prompt"], self.tokenizer.encode(prompt["prompt"])
        raise MissingParameter("a prompt needs one of prompt, prompt_token_ids, messages", param="prompt")

    def submit_prompt(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestHandle:
        """Tokenise and queue."""
        text, ids = self.tokenize(prompt)
        return self.submit(new_id("req"), ids, params or SamplingParams(), prompt=text)

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput: ...
    @overload
    def generate(self, prompt: Prompts, params: SamplingParams | None = None) -> list[RequestOutput]: ...
    def generate(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Generate and wait: one prompt in, one output out; a list in, a list out, batched."""
        if isinstance(prompt, str | Mapping):
            return self.submit_prompt(prompt, params).result()
        handles = [self.submit_prompt(p, params) for p in prompt]
        return [h.result() for h in handles]

    async def generate_async(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Like `generate`, for one prompt, without blocking the event loop; a cancelled task aborts the request."""
        import asyncio

        handle = self.submit_prompt(prompt, params)
        try:
            return await asyncio.wrap_future(handle._future)
        except asyncio.CancelledError:
            handle.abort()
            raise

    # State

    @property
    def state(self) -> EngineState:
        if self._state is EngineState.READY and self._scheduler.running:
            return EngineState.BUSY
        return self._state

    @property
    def has_work(self) -> bool:
        return bool(self._handles)

    @property
    def steps_total(self) -> int:
        return self.stats.steps

    @property
    def slots(self) -> int:
        return self.config.max_num_seqs

    def get_stats(self) -> dict[str, Any]:
        """The counters of `EngineStats`, with `running`, `waiting`, `mean_batch` and `state`."""
        live = {"running": len(self._scheduler.running), "waiting": self._scheduler.waiting, "state": self.state.value}
        return {**asdict(self.stats), "mean_batch": self.stats.mean_batch, **live}

    def get_health(self) -> HealthStatus:
        """Healthy while the step loop lives."""
        alive = self._thread.is_alive() and self._state is not EngineState.ERROR
        since = time.monotonic() - self.last_step_at if self.has_work else None
        return HealthStatus(alive, self.state, len(self._scheduler.running), self._scheduler.waiting, since)

    def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for what is there; whether all of it finished within `timeout` seconds."""
        with self._changed:
            if self._state in (EngineState.READY, EngineState.BUSY):
                self._state = EngineState.DRAINING
            return self._changed.wait_for(lambda: not self._handles, timeout)

    def shutdown(self) -> None:
        """Stop the loop; unfinished requests fail with EngineShutDown. May be called twice."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The loop

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stop or self._handles)
                    if self._stop:
                        break
                    self._drop_aborted()
                    answers = self._scheduler.schedule()
                if answers:
                    self._step(answers)
        except BaseException as exc:
            self._state = EngineState.ERROR
            log.exception("the engine's loop ended")
            self._fail_all(EngineError(f"the engine stopped: {exc}"))
            raise
        self._state = EngineState.SHUTDOWN
        self._fail_all(EngineShutDown("the engine was shut down"))

    def _step(self, answers: list[Answer]) -> None:
        began = time.monotonic()
        now = time.time()
        for answer in answers:
            if answer.request.first_scheduled_time is None:
                answer.request.first_scheduled_time = now
        for commit in self._denoise(answers):
            request = commit.answer.request
            if commit.error is not None:
                self._fail(request, commit.error)
            elif request.request_id in self._handles:
                self._record(commit)
        self.last_step_at = time.monotonic()
        self.stats.steps += 1
        self.stats.sequence_steps += len(answers)
        self.stats.step_seconds += self.last_step_at - began

    def _denoise(self, answers: list[Answer]) -> list[Commit]:
        """One step; on running out of memory, in halves, down to single answers."""
        try:
            self.stats.forwards += 1
            return self.sampler.diffusion_step(answers)
        except (torch.OutOfMemoryError, MemoryError) as exc:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(answers) == 1:
                return [Commit(answers[0], [], [], [], OutOfMemory(f"out of memory for one request alone: {exc}"))]
        except Exception as exc:
            # Whatever one request provoked must not end the others: find it by halving.
            if len(answers) == 1:
                log.exception("a step failed", extra={"request_id": answers[0].request.request_id})
                error = exc if isinstance(exc, VDiffError) else EngineError(f"{type(exc).__name__}: {exc}")
                return [Commit(answers[0], [], [], [], error)]
        half = len(answers) // 2
        return self._denoise(answers[:half]) + self._denoise(answers[half:])

    def _record(self, commit: Commit) -> None:
        answer, request = commit.answer, commit.answer.request
        if request.first_token_time is None:
            request.first_token_time = time.time()
        delta = advance(answer, commit.positions, self.card.mask_token_id)
        if request.listener is not None:
            self._tell(request.listener, commit, delta)
        if answer.finish_reason is not None:
            self._scheduler.finish(answer)
            if request.finished:
                self._finish(request)

    def _tell(self, listener: Listener, commit: Commit, delta: str) -> None:
        answer = commit.answer
        shown = answer.end if answer.end is not None else len(answer.canvas)
        canvas = self._canvas_text(answer) if answer.params.diffusion.visualize else None
        event = StepEvent(
            request_id=answer.request.request_id,
            index=answer.index,
            step=answer.steps,
            forwards=answer.forwards,
            positions=tuple(commit.positions),
            token_ids=tuple(commit.token_ids),
            confidences=tuple(commit.confidences),
            text_delta=delta,
            tokens_committed=answer.end if answer.end is not None else answer.committed,
            tokens_total=shown,
            canvas=canvas,
        )
        try:
            listener(event)
        except Exception:
            log.exception("a listener failed", extra={"request_id": answer.request.request_id})

    def _canvas_text(self, answer: Answer) -> str:
        """The whole current text; masks are shown as U+2591, one each."""
        if answer.finish_reason is not None:
            return answer.text.text
        pieces, run = [], list[int]()
        for token in [*answer.canvas[: answer.block_starts[answer.block + 1]], self.card.mask_token_id]:
            if token == self.card.mask_token_id:
                pieces.append(self.tokenizer.decode(run))
                pieces.append("\u2591")
                run = []
            else:
                run.append(token)
        return "".join(pieces[:-1])

    def _output(self, request: EngineRequest) -> RequestOutput:
        outputs = []
        for answer in request.sequences:
            if answer.finish_reason is None:  # aborted
                answer.text.update(answer.canvas[: answer.prefix], final=True)
            end = answer.prefix if answer.end is None else answer.end
            reason = answer.finish_reason or "abort"
            ids = answer.canvas[:end]
            outputs.append(CompletionOutput(answer.index, answer.text.text, ids, reason, answer.forwards))
        tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.forwards for o in outputs)
        metrics = RequestMetrics(
            arrival_time=request.arrival_time,
            first_scheduled_time=request.first_scheduled_time,
            first_token_time=request.first_token_time,
            finished_time=time.time(),
            prompt_tokens=len(request.prompt_token_ids),
            generated_tokens=tokens,
            forwards=forwards,
            tokens_per_forward=tokens / forwards if forwards else 0.0,
        )
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs,
            not request.aborted,
            metrics,
            request.seed,
        )

    def _take(self, request: EngineRequest) -> RequestHandle | None:
        with self._changed:
            self._scheduler.remove(request)
            self._aborted.discard(request.request_id)
            handle = self._handles.pop(request.request_id, None)
            self._changed.notify_all()
        return handle

    def _finish(self, request: EngineRequest) -> None:
        output = self._output(request)
        self.stats.tokens_generated += output.metrics.generated_tokens
        if request.aborted:
            self.stats.requests_aborted += 1
        else:
            self.stats.requests_finished += 1
        if handle := self._take(request):
            handle._future.set_result(output)

    def _fail(self, request: EngineRequest, error: VDiffError) -> None:
        if handle := self._take(request):
            self.stats.requests_failed += 1
            handle._future.set_exception(error)

    def _drop_aborted(self) -> None:
        """Called with the lock held (it is re-entrant)."""
        for request_id in list(self._aborted):
            request = self._handles[request_id]._request
            request.aborted = True
            self._finish(request)

    def _fail_all(self, error: VDiffError) -> None:
        for handle in list(self._handles.values()):
            self._fail(handle._request, error)
