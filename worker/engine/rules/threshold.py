"""Rules that commit as many as the model is sure of.

threshold, factor: Fast-dLLM, Wu et al. 2025, https://arxiv.org/abs/2505.22618. entropy_bound: EB
sampler, Ben-Hamu et al. 2025, https://arxiv.org/abs/2505.24857. hierarchical, credit: dInfer, 2025,
https://arxiv.org/abs/2510.08666. klass: KLASS, Kim et al. 2025, https://arxiv.org/abs/2511.05664.
low_confidence_dynamic: SDAR, https://arxiv.org/abs/2510.06303. joint_threshold: LLaDA2.1's editing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.diffusion_params import DiffusionParams
from worker.engine.config import DINFER_SLACK
from worker.engine.rules.base import Rule, RuleInput, at_least_best, best, best_of

CREDIT_DECAY, CREDIT_POWER = 0.8, 0.2
KLASS_DIVERGENCE, KLASS_STEPS = 0.01, 2


def _threshold(given: RuleInput) -> float:
    assert given.params.threshold is not None
    return given.params.threshold


class Threshold(Rule):
    """Every position whose confidence reaches the threshold; if none does, the best one and its
    equals within `slack`.
    """

    name = "threshold"

    def select(self, given: RuleInput) -> Tensor:
        reach = _threshold(given)
        if given.slack:
            reach = min(reach, float(given.confidence.max()) - given.slack)
        passed = given.confidence > reach if given.strict else given.confidence >= reach
        return at_least_best(passed, given.confidence)


class Factor(Rule):
    """The longest run of ranks r = 1, 2, ... whose confidence is at least 1 - factor/(r+1); rank 1
    always.

    If only the lowest-ranked position fails, it is accepted too (as the published program does).
    """

    name = "factor"

    def select(self, given: RuleInput) -> Tensor:
        assert given.params.factor is not None
        n = len(given.confidence)
        ordered = best(given.confidence, n)
        ranks = torch.arange(1, n + 1, dtype=torch.float32)
        failed = given.confidence[ordered] < 1 - given.params.factor / (ranks + 1)
        failed[0] = False
        first = int(failed.nonzero()[0]) if bool(failed.any()) else n
        return ordered if first == n - 1 else ordered[:first]


class EntropyBound(Rule):
    """Selection, by ascending entropy, of the most positions whose sum of entropies less the
    largest stays within gamma.
    """

    name = "entropy_bound"
    needs = frozenset({"entropy"})

    def select(self, given: RuleInput) -> Tensor:
        assert given.entropy is not None and given.params.gamma is not None
        ordered = best(-given.entropy, len(given.entropy))
        entropy = given.entropy[ordered]
        within = (
            entropy.cumsum(0) - entropy <= given.params.gamma
        )  # ascending, so the largest is the last
        within[0] = True
        return ordered[: int(within.cumprod(0).sum())]


class Hierarchical(Rule):
    """All above the threshold, of each run of neighbouring masks its best above low_threshold, and
    the best of all.
    """

    name = "hierarchical"

    def select(self, given: RuleInput) -> Tensor:
        confidence, low = given.confidence, given.params.low_threshold
        assert low is not None
        picked = confidence > _threshold(given)
        start = 0
        for i in range(1, len(given.positions) + 1):
            if i == len(given.positions) or given.positions[i] != given.positions[i - 1] + 1:
                top = start + int(best(confidence[start:i], 1))
                picked[top] |= bool(confidence[top] > low)
                start = i
        picked[best(confidence, 1)] = True
        return picked.nonzero().flatten()


class Credit(Threshold):
    """Threshold on logits that remember: a token that keeps coming out on top gathers credit.

    C decays by 0.8 a step, the top token gains p^0.2, and credit_alpha log(1 + C) is added to the
    logits.
    """

    name = "credit"
    keeps_rows = True
    slack = DINFER_SLACK

    def adjust(
        self, logits: Tensor, positions: list[int], params: DiffusionParams, memory: dict[str, Any]
    ) -> Tensor:
        top, token = logits.softmax(-1).max(-1)
        before: dict[int, int] = memory.get("rows", {})
        credit = torch.zeros_like(logits)
        if before:
            rows = torch.tensor([before[p] for p in positions], device=logits.device)
            credit = memory["credit"][rows] * CREDIT_DECAY
        credit.scatter_add_(-1, token[:, None], top[:, None] ** CREDIT_POWER)
        memory["rows"], memory["credit"] = {p: i for i, p in enumerate(positions)}, credit
        assert params.credit_alpha is not None
        return logits + params.credit_alpha * torch.log1p(credit)


class Klass(Rule):
    """Positions above the threshold whose distribution stood still (KL < 0.01) for two steps; else
    the quota's best.
    """

    name = "klass"
    needs = frozenset({"divergence"})
    keeps_rows = True

    def select(self, given: RuleInput) -> Tensor:
        assert given.divergence is not None
        before: dict[int, int] = given.memory.get("still", {})
        moves = (given.divergence >= KLASS_DIVERGENCE).tolist()
        still = {
            p: 0 if moved else before.get(p, 0) + 1
            for p, moved in zip(given.positions, moves, strict=True)
        }
        given.memory["still"] = still
        stable = torch.tensor([still[p] >= KLASS_STEPS for p in given.positions])
        picked = (stable & (given.confidence > _threshold(given))).nonzero().flatten()
        return picked if len(picked) else best(given.confidence, given.quota)


class LowConfidenceDynamic(Rule):
    """All above the threshold when at least the quota are, else the quota's best."""

    name = "low_confidence_dynamic"
    filtered = True

    def select(self, given: RuleInput) -> Tensor:
        passed = (given.confidence > _threshold(given)).nonzero().flatten()
        return passed if len(passed) >= given.quota else best_of(given, given.quota)


class JointThreshold(Rule):
    """Masks by threshold, and committed tokens of the block are replaced where another is surer
    than edit_threshold.

    Once nothing is masked, it goes on until a step edits nothing, at most max_post_edit_steps.
    """

    name = "joint_threshold"
    filtered = True
    sees_committed = True

    def select(self, given: RuleInput) -> Tensor:
        assert (
            given.masked is not None
            and given.changed is not None
            and given.params.edit_threshold is not None
        )
        picked = ~given.masked & given.changed & (given.confidence > given.params.edit_threshold)
        if bool(given.masked.any()):
            passed = given.masked & (given.confidence > _threshold(given))
            if int(passed.sum()) < given.quota:
                passed = torch.zeros_like(passed)
                passed[
                    best_of(
                        given, given.quota, given.confidence.masked_fill(~given.masked, -torch.inf)
                    )
                ] = True
            picked |= passed
        return picked.nonzero().flatten()

    def is_done(self, given: RuleInput, picked: Tensor) -> bool:
        assert given.masked is not None and given.params.max_post_edit_steps is not None
        if bool(given.masked.any()):
            return given.params.max_post_edit_steps == 0 and bool(
                given.masked.sum() == given.masked[picked].sum()
            )
        given.memory["post"] = given.memory.get("post", 0) + 1
        return len(picked) == 0 or given.memory["post"] >= given.params.max_post_edit_steps
