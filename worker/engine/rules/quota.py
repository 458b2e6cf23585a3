"""Rules that commit a fixed number per step (LLaDA, Nie et al. 2025, https://arxiv.org/abs/2502.09992)."""

from __future__ import annotations

from torch import Tensor

from worker.engine.rules.base import RuleInput, best


class LowConfidence:
    """The quota's most confident positions ("low-confidence remasking")."""

    name = "low_confidence"

    def select(self, given: RuleInput) -> Tensor:
        return best(given.confidence, given.quota)


class Random:
    """The quota's positions uniformly at random."""

    name = "random"

    def select(self, given: RuleInput) -> Tensor:
        return best(given.uniform(), given.quota)
