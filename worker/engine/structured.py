"""StructuredDecoder: answers that have to be JSON, committed from left to right so that every
beginning can be completed.

A masked model predicts all positions of the open block at once. A grammar's automaton says what may
follow a beginning, and nothing about a position in the middle. So a step walks from the first
masked position to the right: the automaton forbids tokens, the sampler chooses among the rest as it
always does, the automaton takes the choice, and so on as far as the rule goes:

    sequential    its number of tokens
    threshold     while the model, before anything was forbidden, gives the chosen token at least
                  the threshold; at least one

Tokens that the grammar leaves no choice about come on top and cost no forward. Once complete, an
answer ends without an end token. Every choice is one request's own, so is its text. See
docs/adr/0014-constrained-decoding.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.errors import InvalidParameter, NotFinite
from shared.model_card import ModelCard
from shared.response_format import PARAM
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper
from worker.engine.bias import add_bias
from worker.engine.decoder import Commit, Logits, Plan, error_of, guided
from worker.engine.grammar import Grammars, Structure
from worker.engine.outputs import TokenLogprob
from worker.engine.request import Answer
from worker.engine.sampler import DiffusionSampler, note_forward


@dataclass(slots=True)
class Walk:
    """The tokens that one step commits to one answer, from the first masked position on."""

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: str | None = None
    closed_early: bool = False


class StructuredDecoder:
    """Decodes answers with a `response_format`; plans and chooses as `sampler` does."""

    def __init__(
        self, sampler: DiffusionSampler, tokenizer: TokenizerWrapper, *, card: ModelCard
    ) -> None:
        self._sampler = sampler
        self._grammars = Grammars(tokenizer, card)

    def check(self, params: SamplingParams) -> None:
        """Raises InvalidParameter: the format cannot be enforced with this model."""
        if params.response_format is not None:
            self._grammars.check(params.response_format)

    def plan(self, answer: Answer, rows: int) -> Plan:
        if answer.structure is None:
            assert answer.params.response_format is not None
            answer.structure = self._grammars.start(answer.params.response_format)
        return self._sampler.plan(answer, rows)

    def read(self, plan: Plan, parts: Sequence[Logits]) -> Walk:
        """The tokens that a forward's logits and the grammar give."""
        answer = plan.answer
        logits = guided(parts, answer.params.diffusion.cfg_scale)
        structure = answer.structure
        assert structure is not None
        structure.at(answer.canvas[: answer.prefix])
        return _Walker(self._sampler, answer, structure, plan.wanted, logits).run()

    def finish(self, plans: Sequence[Plan], walks: Sequence[Walk]) -> list[Commit]:
        commits = []
        for plan, walk in zip(plans, walks, strict=True):
            note_forward(plan)
            try:
                commits.append(_commit(plan, walk))
            except Exception as exc:  # whatever it is, it is this request's end and nobody else's
                commits.append(Commit(plan.answer, error=error_of(exc)))
        return commits


def _commit(plan: Plan, walk: Walk) -> Commit:
    answer, positions = plan.answer, plan.wanted[: len(walk.tokens)]
    for i, position in enumerate(positions):
        answer.canvas[position] = walk.tokens[i]
        if walk.logprobs:
            answer.logprobs[position] = walk.logprobs[i]
    structure = answer.structure
    assert structure is not None
    structure.ended, answer.closed_early = walk.ended, answer.closed_early or walk.closed_early
    answer.steps += 1
    answer.block_step += 1
    return Commit(answer, positions, walk.tokens, walk.confidences, walk.logprobs)


class _Walker:
    """One walk along the rows of one forward."""

    def __init__(
        self,
        sampler: DiffusionSampler,
        answer: Answer,
        structure: Structure,
        wanted: list[int],
        logits: Tensor,
    ) -> None:
        self._sampler, self._answer, self._structure = sampler, answer, structure
        self._positions = [
            p for p in wanted if p < answer.limit
        ]  # a block may reach beyond the answer
        self._logits, self._walk = logits, Walk()
        diffusion = answer.params.diffusion
        self._quota = (
            answer.step_quota() if diffusion.algorithm == "sequential" else len(self._positions)
        )
        self._threshold = diffusion.threshold if diffusion.algorithm == "threshold" else None

    def run(self) -> Walk:
        chosen, walk = 0, self._walk
        while len(walk.tokens) < len(self._positions):
            forced = self._structure.forced()[: len(self._positions) - len(walk.tokens)]
            if forced:
                if not self._go(forced):
                    break
                continue
            if chosen >= self._quota:
                break
            token, confidence = self._choose()
            if chosen and self._threshold is not None and confidence < self._threshold:
                break
            chosen += 1
            if token in self._answer.request.end_token_ids:
                self._write(token)
                break
            if not self._go([token]):
                break
        if walk.ended is None and self._left == 0:
            walk.ended = "stop" if self._structure.is_complete else "length"
        return walk

    @property
    def _left(self) -> int:
        """Tokens that the answer may still have."""
        return self._answer.limit - self._answer.prefix - len(self._walk.tokens)

    def _row(self, index: int) -> Tensor:
        return self._logits[index : index + 1]

    def _choose(self) -> tuple[int, float]:
        """The sampler's choice among what the grammar allows, and how sure the model was of it
        before.
        """
        index = len(self._walk.tokens)
        allowed = torch.from_numpy(self._structure.allowed())[None, :]
        if not bool(allowed.any()):
            raise InvalidParameter(
                f"{PARAM}: no token of this model may follow what was written", param=PARAM
            )
        masked = self._row(index).masked_fill(~allowed.to(self._logits.device), -torch.inf)
        choice = self._sampler.calculate_confidence(masked, self._answer, [self._positions[index]])
        token = int(choice.tokens[0])
        return token, float(self._log_p(index)[token].exp())

    def _log_p(self, index: int) -> Tensor:
        """The model's own distribution [vocab] at a position, the request's bias included."""
        row = add_bias(self._row(index).clone(), self._answer.params)[0]
        if not bool(torch.isfinite(row).all()):
            raise NotFinite("the model produced NaN or infinite logits for this request")
        return row.log_softmax(-1)

    def _go(self, tokens: list[int]) -> bool:
        """Commit the tokens if the answer can still be completed behind them, else its ending;
        whether the walk goes on.
        """
        structure = self._structure
        if not structure.fits(tokens, self._left - len(tokens)):
            instead = structure.ending(self._left)
            if instead is not None:
                self._walk.closed_early = True
                tokens = instead[: len(self._positions) - len(self._walk.tokens)]
        for token in tokens:
            structure.take(token)
            self._write(token)
        if structure.is_stopped or (self._walk.closed_early and structure.is_complete):
            self._walk.ended = "stop"
        return self._walk.ended is None

    def _write(self, token: int) -> None:
        log_p, count = self._log_p(len(self._walk.tokens)), self._answer.params.logprobs
        value = float(log_p[token])
        self._walk.tokens.append(token)
        self._walk.confidences.append(math.exp(value))
        if count is None:
            return
        top: tuple[tuple[int, float], ...] = ()
        if count:
            best = log_p.topk(count)
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self._walk.logprobs.append(TokenLogprob(token, value, top))
