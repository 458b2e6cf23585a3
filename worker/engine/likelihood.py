"""Likelihood of an answer given a context.

Monte Carlo: LLaDA's estimate (Nie et al. 2025, https://arxiv.org/abs/2502.09992, appendix): mask a
random number of the answer's tokens, weigh their cross-entropy by length / masked, average over
draws. Chain rule: the answer's tokens from left to right, each predicted with all that follow
masked; a proper likelihood of that order, and for block-causal models exact.

A score is a request like any other: it joins the engine's steps, as many of its noised sequences at
a time as there is room.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shared.algorithms import BLOCK, CHAIN_RULE, MONTE_CARLO
from shared.errors import InvalidParameter, NotFinite
from worker.engine.batch import Pass
from worker.engine.config import ModelConfig
from worker.engine.decoder import Commit, Logits, Plan, guided
from worker.engine.passes import twins
from worker.engine.request import Answer

Read = tuple[float, bool, tuple[tuple[int, float], ...]]
WANTED_ROWS = 512  # rows of logits that one step of one score may hold


@dataclass(frozen=True, slots=True)
class Draw:
    """One noised copy of the answer: which of its positions are masked, which are scored, and with
    what weight.
    """

    masked: tuple[int, ...]
    scored: tuple[int, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Natural logarithms."""

    value: float
    standard_error: float  # 0 for the chain rule
    forwards: int
    token_logprobs: list[float] | None = None  # chain rule: one for each token of the answer
    tops: list[tuple[tuple[int, float], ...]] | None = (
        None  # chain rule, when asked for: the likeliest, best first
    )
    greedy: bool | None = None  # chain rule: whether each token is the likeliest in its place


@dataclass(slots=True)
class ScoreTask:
    """The open work of a score, and its results so far."""

    draws: list[Draw]
    target: list[int]
    method: str
    top: int = 0  # chain rule: alternatives of each token that are reported
    next: int = 0
    values: list[float] = field(default_factory=list)  # of each draw, its weighted log-probability
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    greedy: bool = True

    def result(self) -> LogLikelihood:
        n = len(self.values)
        if self.method == CHAIN_RULE:
            tops = list(self.tops) if self.top else None
            return LogLikelihood(
                math.fsum(self.values), 0.0, n, list(self.values), tops, self.greedy
            )
        mean = math.fsum(self.values) / n
        spread = math.fsum((v - mean) ** 2 for v in self.values) / (n - 1) if n > 1 else math.inf
        return LogLikelihood(mean, math.sqrt(spread / n), n)


def monte_carlo_draws(length: int, mc_num: int, rng: random.Random) -> list[Draw]:
    """`mc_num` draws; the numbers of masked tokens are spread evenly over 1..length from a random
    start (stratified).
    """
    start = rng.randint(1, length)
    counts = [(round(start + i * length / mc_num) - 1) % length + 1 for i in range(mc_num)]
    return [draw_of(rng.sample(range(length), count), length) for count in counts]


def draw_of(masked: Sequence[int], length: int) -> Draw:
    positions = tuple(sorted(masked))
    return Draw(positions, positions, length / len(positions))


def chain_draws(length: int) -> list[Draw]:
    return [Draw(tuple(range(i, length)), (i,), 1.0) for i in range(length)]


def task_of(
    target: Sequence[int], method: str, mc_num: int, seed: int, regime: str, top: int = 0
) -> ScoreTask:
    """Raises InvalidParameter."""
    if not target:
        raise InvalidParameter("the answer is empty", param="target")
    if method == CHAIN_RULE:
        return ScoreTask(chain_draws(len(target)), list(target), method, top)
    if top:
        raise InvalidParameter(f"top needs {CHAIN_RULE}", param="top")
    if method != MONTE_CARLO:
        raise InvalidParameter(f"method must be {MONTE_CARLO} or {CHAIN_RULE}", param="method")
    if regime == BLOCK:
        message = f"{MONTE_CARLO} needs full attention; block-causal models have {CHAIN_RULE}"
        raise InvalidParameter(message, param="method")
    if mc_num < 1:
        raise InvalidParameter("mc_num must be at least 1", param="mc_num")
    return ScoreTask(
        monte_carlo_draws(len(target), mc_num, random.Random(seed)), list(target), method
    )


def _top(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    best = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class LikelihoodScorer:
    """The decoder of scores: commits nothing, adds up."""

    def __init__(self, facts: ModelConfig) -> None:
        self.facts = facts

    def plan(self, answer: Answer, rows: int) -> Plan:
        """Plan as many draws as fit into `rows`, at least one."""
        task: ScoreTask = answer.request.score
        made: list[Pass] = []
        wanted: list[int] = []
        used = held = 0
        for index in range(task.next, len(task.draws)):
            some = self._passes(answer, task, task.draws[index])
            size = sum(len(p.ids) for p in some)
            held += sum(len(p.wanted) for p in some)
            if made and (used + size > rows or held > WANTED_ROWS):
                break
            used += size
            made += some
            wanted.append(index)
        return Plan(answer, made, wanted)

    def _passes(self, answer: Answer, task: ScoreTask, draw: Draw) -> list[Pass]:
        noised = list(task.target)
        for position in draw.masked:
            noised[position] = answer.mask
        prompt, block = answer.prompt, answer.params.diffusion.block_length or 1
        made = []
        for twin in range(twins(answer)):
            tokens = (prompt if twin == 0 else [answer.mask] * len(prompt)) + noised
            rows = [max(len(prompt) + p - self.facts.shift, 0) for p in draw.scored]
            if answer.regime == BLOCK:
                # What follows the last scored token's block is not seen; the block itself is whole.
                stop = (len(prompt) + draw.scored[-1]) // block * block + block
                tokens = (tokens + [answer.mask] * block)[:stop]
                made.append(Pass(tokens, rows, 0, "block", block))
            else:
                made.append(Pass(tokens, rows))
        return made

    def read(self, plan: Plan, parts: Sequence[Logits]) -> list[Read]:
        """The weighted log-probability of each draw, whether its tokens are the likeliest, and the
        likeliest of the last.
        """
        answer = plan.answer
        task: ScoreTask = answer.request.score
        each = twins(answer)
        sums, likeliest, tops = [], [], []
        for i, index in enumerate(plan.wanted):
            draw = task.draws[index]
            logits = guided(parts[i * each : (i + 1) * each], answer.params.diffusion.cfg_scale)
            target = torch.tensor([task.target[p] for p in draw.scored], device=logits.device)
            logprobs = logits.log_softmax(-1)
            sums.append(logprobs.gather(-1, target[:, None]).sum() * draw.weight)
            likeliest.append((logits.argmax(-1) == target).all())
            tops.append(_top(logprobs[-1], task.top))
        return list(
            zip(torch.stack(sums).tolist(), torch.stack(likeliest).tolist(), tops, strict=True)
        )

    def finish(self, plans: Sequence[Plan], reads: Sequence[Any]) -> list[Commit]:
        commits = []
        for plan, read in zip(plans, reads, strict=True):
            task: ScoreTask = plan.answer.request.score
            plan.answer.forwards += len(plan.wanted)
            if not all(math.isfinite(value) for value, _, _ in read):
                error = NotFinite("the model produced NaN or infinite logits for this request")
                commits.append(Commit(plan.answer, error=error))
                continue
            task.values += [value for value, _, _ in read]
            task.greedy = task.greedy and all(greedy for _, greedy, _ in read)
            task.tops += [top for _, _, top in read]
            task.next += len(plan.wanted)
            if task.next == len(task.draws):
                plan.answer.finish_reason, plan.answer.end = "score", 0
            commits.append(Commit(plan.answer))
        return commits
