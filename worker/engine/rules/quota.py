"""Rules that commit a fixed number per step.

LLaDA: Nie et al. 2025, https://arxiv.org/abs/2502.09992. Dream: Ye et al. 2025,
https://arxiv.org/abs/2508.15487; its maskgit_plus follows MaskGIT (Chang et al. 2022). Static SDAR:
https://arxiv.org/abs/2510.06303.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.engine.rules.base import Rule, RuleInput, best, best_of, gumbel
from worker.engine.schedule import times


class LowConfidence(Rule):
    """The quota's most confident positions ("low-confidence remasking")."""

    name = "low_confidence"
    raw = True

    def select(self, given: RuleInput) -> Tensor:
        return best_of(given, given.quota)


class LowConfidenceStatic(LowConfidence):
    """The same over one block's own schedule (SDAR)."""

    name = "low_confidence_static"
    filtered = True
    raw = False


class Random(Rule):
    """The quota's positions uniformly at random."""

    name = "random"

    def select(self, given: RuleInput) -> Tensor:
        return best(given.uniform(1), given.quota)


class Sequential(Rule):
    """The quota's leftmost positions."""

    name = "sequential"

    def select(self, given: RuleInput) -> Tensor:
        return torch.arange(given.quota)


class _Dream(Rule):
    """The quota's best by a score; with alg_temp > 0 drawn without replacement in proportion to
    softmax(score / alg_temp).

    Gumbel noise on the scores, then the best, is that very draw (Kool et al. 2019,
    https://arxiv.org/abs/1903.06059).
    """

    filtered = True

    def score(self, given: RuleInput) -> Tensor:
        raise NotImplementedError

    def select(self, given: RuleInput) -> Tensor:
        score = self.score(given)
        if given.params.alg_temp:
            score = score.double() / given.params.alg_temp + gumbel(given.uniform(1).double())
        return best_of(given, given.quota, score)


class MaskgitPlus(_Dream):
    """Ranking by the probability of the chosen token."""

    name = "maskgit_plus"

    def score(self, given: RuleInput) -> Tensor:
        return given.confidence


class TopkMargin(_Dream):
    """Ranking by the difference of the two highest probabilities."""

    name = "topk_margin"
    needs = frozenset({"margin"})

    def score(self, given: RuleInput) -> Tensor:
        assert given.margin is not None
        return given.margin


class Entropy(_Dream):
    """Ranking by negative entropy."""

    name = "entropy"
    needs = frozenset({"entropy"})

    def score(self, given: RuleInput) -> Tensor:
        assert given.entropy is not None
        return -given.entropy


class Origin(Rule):
    """Each masked position independently with probability 1 - s/t, all at the last step.

    Steps of the schedule in which chance picks nothing are passed over: without a commit a forward
    would change nothing.
    """

    name = "origin"
    filtered = True

    def select(self, given: RuleInput) -> Tensor:
        n = len(given.positions)
        steps = given.block_steps
        time = times(steps, given.params.eps or 1e-3)
        while (step := given.memory.get("step", 0)) < steps - 1:
            given.memory["step"] = step + 1
            share = 1.0 - float(time[step + 1]) / float(time[step])
            picked = (given.uniform(16 + step) < share).nonzero().flatten()
            if len(picked):
                return picked
        return torch.arange(n)
