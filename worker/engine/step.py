"""Stepper: what one step computes. K/V moves as the scheduler decided, one forward serves
everybody, decoders commit.

An error of one request ends that request alone: whatever a forward raises, the step is made again
in halves, down to single answers, and who has committed keeps it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.algorithms import UNIFORM
from shared.errors import OutOfMemory
from worker.engine import passes
from worker.engine.apd import APDDecoder
from worker.engine.decoder import Commit, Decoder, Logits, Plan, error_of
from worker.engine.likelihood import LikelihoodScorer
from worker.engine.loader import LoadedModel
from worker.engine.renoise import RenoiseDecoder
from worker.engine.request import Answer
from worker.engine.sampler import DiffusionSampler, DiffusionSamplerConfig
from worker.engine.scheduler import Decision
from worker.engine.state import EngineStats
from worker.engine.structured import StructuredDecoder

log = logging.getLogger(__name__)


class Stepper:
    """The decoders of one model and the forward that they share.

    Args:
        on_out_of_memory: told how many sequences a step had that found no memory.
    """

    def __init__(
        self, loaded: LoadedModel, stats: EngineStats, *, on_out_of_memory: Callable[[int], object]
    ) -> None:
        self.card, self.model, self.stats = loaded.card, loaded.model, stats
        self._on_out_of_memory = on_out_of_memory
        tokenizer, facts, card = loaded.tokenizer, loaded.facts, loaded.card
        settings = DiffusionSamplerConfig(mask_id=card.mask_token_id)
        self.sampler = DiffusionSampler(self.model, tokenizer, settings, facts=facts, card=card)
        self.apd = APDDecoder(self.model, loaded.verifier, tokenizer, facts=facts, card=card)
        self.scorer = LikelihoodScorer(facts)
        self.renoise = RenoiseDecoder(self.model, tokenizer, card=card)
        self.structured = StructuredDecoder(self.sampler, tokenizer, card=card)

    def move(self, decision: Decision) -> list[Commit]:
        """K/V to host memory and back, and new ones; what finds no memory even so fails."""
        commits = []
        for answer in decision.swap_out:
            for cache in answer.all_caches:
                cache.swap_out()
        for answer in decision.swap_in:
            try:
                for cache in answer.all_caches:
                    cache.swap_in()
                while passes.capacity(answer) and len(answer.caches) < passes.twins(answer):
                    answer.caches.append(self.model.new_cache(passes.capacity(answer)))
            except (torch.OutOfMemoryError, MemoryError) as exc:
                commits.append(Commit(answer, error=OutOfMemory(f"no memory for its K/V: {exc}")))
        return commits

    def decode(self, chosen: Sequence[tuple[Answer, int]]) -> list[Commit]:
        """One step; on running out of memory, or whatever else, in halves, down to single answers."""
        if not chosen:
            return []
        remembered = [dict(answer.memory) for answer, _ in chosen]
        commits: list[Commit] = []
        try:
            self.stats.forwards += 1
            with torch.inference_mode():
                self._forward(chosen, commits)
            return commits
        except Exception as exc:
            # Whatever one request provoked must not end the others: find it by halving. Who has
            # committed already (another decoder of the same forward failed) has made this step, and
            # keeps it.
            done = {id(commit.answer) for commit in commits}
            left = [
                (pair, memory)
                for pair, memory in zip(chosen, remembered, strict=True)
                if id(pair[0]) not in done
            ]
            for (answer, _), memory in left:
                answer.memory = memory
            chosen = [pair for pair, _ in left]
            if isinstance(exc, torch.OutOfMemoryError | MemoryError):
                self._on_out_of_memory(len(chosen))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if len(chosen) == 1 and not commits:
                log.exception(
                    "a step failed", extra={"request_id": chosen[0][0].request.request_id}
                )
                return [Commit(chosen[0][0], error=error_of(exc))]
        half = (len(chosen) + 1) // 2 if len(chosen) > 1 else 0
        return commits + self.decode(chosen[:half]) + self.decode(chosen[half:])

    def _forward(self, chosen: Sequence[tuple[Answer, int]], commits: list[Commit]) -> None:
        """One forward of all; what each decoder makes of it is added to `commits` as soon as it is
        done.
        """
        if self.card.regime == UNIFORM:
            commits += self._renoise(chosen)
            return
        plans = [self._decoder(answer)[1].plan(answer, rows) for answer, rows in chosen]
        parts = iter(self.model.compute([p for plan in plans for p in plan.passes]))
        reads: dict[str, list[tuple[Plan, Any]]] = {}
        for plan in plans:
            if plan.prefill:
                for _ in plan.passes:
                    next(parts)
                passes.after_prefill(plan.answer, plan.passes)
                self.stats.prefill_forwards += 1
                continue
            plan.answer.request.prompt_done_time = (
                plan.answer.request.prompt_done_time or time.time()
            )
            kind, decoder = self._decoder(plan.answer)
            read = self._read(decoder, plan, [next(parts) for _ in plan.passes])
            if isinstance(read, Commit):
                commits.append(read)
            else:
                reads.setdefault(kind, []).append((plan, read))
        for some in reads.values():
            decoder = self._decoder(some[0][0].answer)[1]
            commits += decoder.finish([plan for plan, _ in some], [read for _, read in some])

    def _renoise(self, chosen: Sequence[tuple[Answer, int]]) -> list[Commit]:
        answers = [answer for answer, _ in chosen]
        before = sum(answer.prefill_forwards for answer in answers)
        try:
            return self.renoise.renoise_step(answers, [rows for _, rows in chosen])
        finally:
            self.stats.prefill_forwards += (
                sum(answer.prefill_forwards for answer in answers) - before
            )

    def _decoder(self, answer: Answer) -> tuple[str, Decoder]:
        """Return the decoder of an answer, and the name under which its reads are gathered."""
        if answer.request.score is not None:
            return "score", self.scorer
        if answer.params.diffusion.algorithm == "apd":
            return "apd", self.apd
        if answer.params.response_format is not None:
            return "structured", self.structured
        return "rules", self.sampler

    @staticmethod
    def _read(decoder: Decoder, plan: Plan, parts: list[Logits]) -> Any:
        """Have the decoder read a plan's logits. Its error is the answer's own, unless memory ran
        out.
        """
        try:
            return decoder.read(plan, parts)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as exc:
            return Commit(plan.answer, error=error_of(exc))
