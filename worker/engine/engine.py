"""VDiffEngine: one model, one step loop, any number of requests that join and leave between steps.

A thread makes all steps: schedule (`Scheduler`), one forward of everybody's passes and what each
decoder makes of it (`Stepper`), then tell listeners and finish what ended. `submit`, `abort` and
the rest may be called from any thread. An error of one request ends that request alone; running out
of memory halves the batch before anything is given up.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, overload

from shared.algorithms import CHAIN_RULE, FULL, MONTE_CARLO, UNIFORM
from shared.diffusion_params import DiffusionParams
from shared.errors import EngineShutDown, EngineStopped, InvalidParameter, VDiffError
from shared.ids import new_id
from shared.jobs.infill import filled
from shared.sampling_params import SamplingParams
from shared.stop_strings import check_stops
from worker.engine import passes
from worker.engine.config import VDiffConfig
from worker.engine.decoder import Commit
from worker.engine.handle import RequestHandle
from worker.engine.inputs import Prompt, Prompts, checked_ids, holed, tokenized
from worker.engine.likelihood import LogLikelihood, ScoreTask, task_of
from worker.engine.loader import LoadedModel, load
from worker.engine.memory import Need, cache_capacity
from worker.engine.outputs import InfillOutput, RequestOutput
from worker.engine.report import charge, event_of, output_of
from worker.engine.request import EngineRequest, Listener, end_tokens
from worker.engine.scheduler import Decision, Scheduler
from worker.engine.state import EngineState, EngineStats, HealthStatus
from worker.engine.step import Stepper
from worker.engine.stopping import advance

log = logging.getLogger(__name__)


class VDiffEngine:
    """Loads on construction; use as a context manager or call `shutdown`.

    Args:
        loaded: a model that is in memory already (tests, benchmarks); else `config` says what to
            load.

    Raises:
        ConfigurationError, ModelLoadError: from loading.
    """

    def __init__(self, config: VDiffConfig, *, loaded: LoadedModel | None = None) -> None:
        self.config = config
        self._state = EngineState.LOADING
        loaded = loaded or load(config)
        self.card, self.tokenizer, self.model = loaded.card, loaded.tokenizer, loaded.model
        self.facts = loaded.facts
        self.stats = EngineStats()
        self.last_step_at = self._busy_since = time.monotonic()
        self._need = Need(self.model, loaded.verifier)
        self._scheduler = Scheduler(
            config.max_num_seqs,
            max_rows=config.max_batched_tokens,
            max_memory=cache_capacity(config, self.model),
            memory=self._need,
            rows=passes.rows_needed,
            divisible=passes.is_divisible,
            greedy=lambda answer: answer.request.score is not None,
        )
        self._stepper = Stepper(loaded, self.stats, on_out_of_memory=self._scheduler.shrink)
        self.sampler, self.apd, self.renoise = (
            self._stepper.sampler,
            self._stepper.apd,
            self._stepper.renoise,
        )
        self._handles: dict[str, RequestHandle] = {}
        self._aborted: set[str] = set()
        self._changed = threading.Condition(threading.RLock())
        self._stop = False
        self._state = EngineState.READY
        self._thread = threading.Thread(target=self._loop, name="vdiff-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> VDiffEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
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
        canvas: Sequence[int] | None = None,
    ) -> RequestHandle:
        """Queue a request; returns at once. Without a seed one is drawn, and reported in the
        output.

        Args:
            canvas: for infill: what stands after the prompt, the mask id in the holes; its length
                is the answer's.

        Raises:
            EngineShutDown: draining or shut down.
            InvalidParameter: empty prompt, a token outside the vocabulary, prompt and answer beyond
                the context or the memory, parameters that do not fit the model, or a request_id
                that is already in the engine.
        """
        ids = checked_ids(self.card, prompt_token_ids, params, canvas)
        return self._enqueue(
            request_id,
            ids,
            params,
            prompt=prompt,
            priority=priority,
            listener=listener,
            canvas=canvas,
        )

    def _enqueue(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        *,
        priority: int,
        prompt: str | None = None,
        listener: Listener | None = None,
        canvas: Sequence[int] | None = None,
        seed: int | None = None,
        score: ScoreTask | None = None,
    ) -> RequestHandle:
        params = params.completed(self.card)
        self._stepper.structured.check(params)
        if seed is None:
            seed = secrets.randbits(63) if params.seed is None else params.seed
        request = EngineRequest(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=ids,
            params=params,
            seed=seed,
            priority=priority,
            arrival_time=time.time(),
            end_token_ids=frozenset() if canvas is not None else self._end_tokens(params),
            listener=listener,
            canvas=None if canvas is None else list(canvas),
            score=score,
        )
        request.make_sequences(self.tokenizer, self.card)
        needed = self._need(request.sequences[0])
        if needed > self._scheduler.max_memory:
            message = f"the K/V cache of this request needs {needed} positions; there are {self._scheduler.max_memory}"
            raise InvalidParameter(
                f"{message}: shorten it, or use cache none", param="diffusion.cache"
            )
        handle = RequestHandle(request, self.abort)
        with self._changed:
            if self._state not in (EngineState.READY, EngineState.BUSY):
                raise EngineShutDown(f"the engine is {self._state.value} and takes no requests")
            if request_id in self._handles:
                raise InvalidParameter(
                    f"request {request_id} is already running", param="request_id"
                )
            self._handles[request_id] = handle
            self._scheduler.add(request)
            self._changed.notify()
        return handle

    def _end_tokens(self, params: SamplingParams) -> frozenset[int]:
        return end_tokens(params, self.card.end_token_ids, self.tokenizer)

    def infill(
        self, parts: Sequence[str | int], params: SamplingParams | None = None
    ) -> InfillOutput:
        """Fill holes in a text and wait: strings are fixed text, integers are holes of so many
        tokens.

        Raises:
            InvalidParameter: no hole, a hole of no tokens, or a model that cannot see what follows
                a hole.
        """
        task, ids = holed(parts, self.card, self.tokenizer)
        begin = task.holes()[0][0]
        asked = replace(params or SamplingParams(temperature=0.0), max_tokens=len(ids) - begin)
        output = self.submit(new_id("req"), ids[:begin], asked, canvas=ids[begin:]).result()
        answer, ends = output.outputs[0].token_ids, self.card.end_token_ids
        texts, text, _ = filled(task, ids, answer, ends, self.tokenizer)
        return InfillOutput(text, texts, output)

    def submit_score(
        self,
        request_id: str,
        context: Sequence[int],
        target: Sequence[int],
        *,
        method: str | None = None,
        mc_num: int = 128,
        seed: int = 0,
        cfg_scale: float = 0.0,
        top: int = 0,
        priority: int = 0,
        listener: Listener | None = None,
        task: ScoreTask | None = None,
    ) -> RequestHandle:
        """Queue a score; the result is in `RequestOutput.likelihood`.

        Args:
            method: `monte_carlo` (LLaDA's estimate) or `chain_rule`; None: the first where
                attention is full.
            top: with `chain_rule`, how many of the likeliest tokens are told of each place.
            task: given draws instead of random ones (tests).

        Raises:
            InvalidParameter: empty or too long, or a method that does not fit the model.
        """
        if self.card.regime == UNIFORM:
            raise InvalidParameter(f"{self.card.name} gives no likelihoods", param="model")
        diffusion = DiffusionParams(cache="none", cfg_scale=cfg_scale)
        params = SamplingParams(
            max_tokens=max(len(target), 1), temperature=0.0, diffusion=diffusion
        )
        ids = checked_ids(self.card, context, params, None)
        checked_ids(self.card, target or [0], SamplingParams(max_tokens=1), None)
        method = method or (MONTE_CARLO if self.card.regime == FULL else CHAIN_RULE)
        task = task or task_of(target, method, mc_num, seed, self.card.regime, top)
        return self._enqueue(
            request_id, ids, params, priority=priority, seed=seed, score=task, listener=listener
        )

    def loglikelihood(
        self, context: Sequence[int], target: Sequence[int], **options: Any
    ) -> LogLikelihood:
        """Score `target` after `context` (token ids); waits. Options as `submit_score` has them."""
        likelihood = (
            self.submit_score(new_id("req"), context, target, **options).result().likelihood
        )
        assert likelihood is not None
        return likelihood

    def abort(self, request_id: str) -> bool:
        """Drop a request before the next step; False when the engine does not have it."""
        with self._changed:
            if request_id not in self._handles:
                return False
            self._aborted.add(request_id)
            self._changed.notify()
            return True

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text and token ids, in any of its forms: a string, or {prompt |
        prompt_token_ids | messages}.
        """
        return tokenized(prompt, self.card, self.tokenizer)

    def submit_prompt(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestHandle:
        """Tokenise and queue."""
        text, ids = self.tokenize(prompt)
        params = params or SamplingParams()
        check_stops(params.stop, self.card, self.tokenizer)
        return self.submit(new_id("req"), ids, params, prompt=text)

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput: ...
    @overload
    def generate(
        self, prompt: Prompts, params: SamplingParams | None = None
    ) -> list[RequestOutput]: ...
    def generate(
        self, prompt: Prompt | Prompts, params: SamplingParams | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Generate and wait: one prompt in, one output out; a list in, a list out, batched."""
        if isinstance(prompt, str | Mapping):
            return self.submit_prompt(prompt, params).result()
        handles: list[RequestHandle] = []
        try:
            for one in prompt:
                handles.append(self.submit_prompt(one, params))
            return [h.result() for h in handles]
        except BaseException:
            for handle in handles:  # nobody would fetch what the others write
                handle.abort()
            raise

    async def generate_async(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> RequestOutput:
        """Like `generate`, for one prompt, without blocking the event loop; a cancelled task aborts
        the request.
        """
        import asyncio

        handle = self.submit_prompt(prompt, params)
        try:
            return await asyncio.wrap_future(handle.future)
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
        """The counters of `EngineStats`, with what the scheduler holds and what APD accepted."""
        scheduler = self._scheduler
        live = {
            "running": len(scheduler.running),
            "waiting": scheduler.waiting,
            "state": self.state.value,
            "preemptions": scheduler.preemptions,
            "cache_tokens_in_use": scheduler.memory_in_use,
            "cache_tokens": scheduler.max_memory,
        }
        apd = {
            "drafted": self.apd.drafted,
            "accepted": self.apd.accepted,
            "acceptance_rate": self.apd.acceptance_rate,
            "apd_tokens_per_step": self.apd.tokens_per_step,
            "verifier_seconds": self.apd.verifier_seconds,
        }
        return {**asdict(self.stats), "mean_batch": self.stats.mean_batch, **live, **apd}

    def get_health(self) -> HealthStatus:
        """Healthy while the step loop lives, and makes steps while there is work
        (`watchdog_seconds`).
        """
        alive = self._thread.is_alive() and self._state is not EngineState.ERROR
        since = (
            time.monotonic() - max(self.last_step_at, self._busy_since) if self.has_work else None
        )
        hung = since is not None and since > self.config.watchdog_seconds
        detail = (
            f"no step for {since:.0f} s" if hung else "" if alive else "the step loop has ended"
        )
        running, waiting = len(self._scheduler.running), self._scheduler.waiting
        return HealthStatus(alive and not hung, self.state, running, waiting, since, detail)

    def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for what is there; whether all of it finished within `timeout`
        seconds.
        """
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
                    if not self._handles:
                        self._changed.wait_for(lambda: self._stop or self._handles)
                        self._busy_since = time.monotonic()
                    if self._stop:
                        break
                    self._drop_aborted()
                    decision = self._scheduler.schedule()
                if decision.run:
                    self._step(decision)
        except BaseException as exc:
            self._state = EngineState.ERROR
            log.exception("the engine's loop ended")
            self._fail_all(EngineStopped(f"the engine stopped: {exc}"))
            raise
        self._state = EngineState.SHUTDOWN
        self._fail_all(EngineShutDown("the engine was shut down"))

    def _step(self, decision: Decision) -> None:
        began = time.monotonic()
        now = time.time()
        for answer, _ in decision.run:
            if answer.request.first_scheduled_time is None:
                answer.request.first_scheduled_time = now
        commits = self._stepper.move(decision) + self._stepper.decode(decision.run)
        charge(decision.run, time.monotonic() - began)
        for commit in commits:
            request = commit.answer.request
            if request.request_id not in self._handles:
                continue
            if commit.error is not None:
                self._fail(request, commit.error)
            else:
                self._record(commit)
        self.last_step_at = time.monotonic()
        self.stats.note_step(len(decision.run), self.last_step_at - began)

    def _record(self, commit: Commit) -> None:
        answer, request = commit.answer, commit.answer.request
        if request.first_token_time is None and commit.positions:
            request.first_token_time = time.time()
        refreshes = answer.cache_refreshes
        delta = "" if request.score is not None else advance(answer, block_done=commit.block_done)
        if request.listener is not None:
            event = event_of(commit, delta, self.tokenizer)
            try:
                request.listener(event)
            except Exception:  # somebody else's code: it must not end the step
                log.exception("a listener failed", extra={"request_id": request.request_id})
        if answer.finish_reason is not None:
            self.stats.cache_refreshes += refreshes
            self._scheduler.finish(answer)
            if request.finished:
                self._finish(request)

    def _take(self, request: EngineRequest) -> RequestHandle | None:
        for answer in request.sequences:
            answer.release()
        with self._changed:
            self._scheduler.remove(request)
            self._aborted.discard(request.request_id)
            handle = self._handles.pop(request.request_id, None)
            self._changed.notify_all()
        return handle

    def _finish(self, request: EngineRequest) -> None:
        output = output_of(request)
        self.stats.tokens_generated += output.metrics.generated_tokens
        if request.aborted:
            self.stats.requests_aborted += 1
        else:
            self.stats.requests_finished += 1
        if handle := self._take(request):
            handle.future.set_result(output)

    def _fail(self, request: EngineRequest, error: VDiffError) -> None:
        if handle := self._take(request):
            self.stats.requests_failed += 1
            handle.future.set_exception(error)

    def _drop_aborted(self) -> None:
        """Called with the lock held (it is re-entrant)."""
        for request_id in list(self._aborted):
            request = self._handles[request_id].request
            request.aborted = True
            self._finish(request)

    def _fail_all(self, error: VDiffError) -> None:
        for handle in list(self._handles.values()):
            self._fail(handle.request, error)
