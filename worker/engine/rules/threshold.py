"""Rules that commit as many as the confidences allow (Fast-dLLM, Wu et al. 2025, https://arxiv.org/abs/2505.22618)."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.engine.rules.base import RuleInput, best


class Threshold:
    """Every position whose confidence reaches the threshold; if none does, the best one."""

    name = "threshold"

    def select(self, given: RuleInput) -> Tensor:
        passed = (given.confidence >= given.params.threshold).nonzero().flatten()
        return passed if len(passed) else best(given.confidence, 1)


class Factor:
    """The longest run of ranks r = 1, 2, ... whose confidence is at least 1 - factor/(r+1); rank 1 always.

    If only the lowest-ranked position fails, it is accepted too (as the published program does).
    """

    name = "factor"

    def select(self, given: RuleInput) -> Tensor:
        n = len(given.confidence)
        ordered = best(given.confidence, n)
        ranks = torch.arange(1, n + 1, device=ordered.device, dtype=torch.float32)
        failed = given.confidence[ordered] < 1 - given.params.factor / (ranks + 1)
        failed[0] = False
        first = int(failed.nonzero()[0]) if bool(failed.any()) else n
        return ordered if first == n - 1 else ordered[:first]
