"""The protocol of a rule, and what it sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.diffusion_params import DiffusionParams


@dataclass(frozen=True, slots=True)
class RuleInput:
    """The input of a rule: n candidate positions of one answer's open block, left to right. Tensors
    are on the CPU.
    """

    positions: list[int]  # [n], counted from the answer's start
    confidence: Tensor  # [n] float, probability of the chosen token
    quota: int  # tokens this step should commit, at least 1, at most n
    block_steps: int  # steps of the open block's schedule
    params: DiffusionParams
    uniform: Callable[
        [int], Tensor
    ]  # stream -> [n] float in (0, 1), a function of (seed, step, position, stream) alone
    margin: Tensor | None = None  # [n], first minus second probability
    entropy: Tensor | None = None  # [n], nats
    divergence: Tensor | None = (
        None  # [n], KL from the distribution of the step before; inf where there was none
    )
    masked: Tensor | None = None  # [n] bool, for rules that also see committed tokens
    changed: Tensor | None = (
        None  # [n] bool: the chosen token differs from the one that stands there
    )
    row: tuple[int, int] | None = (
        None  # of what the published program ranks: where position 0 stands, and the length
    )
    strict: bool = False  # a threshold is passed above it only
    slack: float = 0.0  # how far below the best confidence one still counts as equal to it
    memory: dict[str, Any] = field(default_factory=dict)  # the rule's own, for the open block


class Rule:
    """Which candidates a step commits: a pure function of its input and of `memory`."""

    name: ClassVar[str]
    filtered: ClassVar[bool] = (
        False  # probabilities of the tempered, filtered distribution instead of the raw logits'
    )
    raw: ClassVar[bool] = False  # those of the raw logits on block-causal models too
    needs: ClassVar[frozenset[str]] = frozenset()  # of "margin", "entropy", "divergence"
    keeps_rows: ClassVar[bool] = False  # remembers something of each candidate's whole distribution
    slack: ClassVar[float] = 0.0  # `RuleInput.slack` on models with full attention
    sees_committed: ClassVar[bool] = (
        False  # candidates are all tokens of the block, not the masked ones alone
    )

    def adjust(
        self, logits: Tensor, positions: list[int], params: DiffusionParams, memory: dict[str, Any]
    ) -> Tensor:
        """Logits [n, vocab] before a token is chosen; may be changed in place."""
        return logits

    def select(self, given: RuleInput) -> Tensor:
        """Indices [k] into the candidates, 1 <= k <= n where a masked one is left."""
        raise NotImplementedError

    def is_done(self, given: RuleInput, picked: Tensor) -> bool:
        """For rules that edit: whether the block, in which nothing is masked any more, is finished."""
        return True


def best(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores; of equals the leftmost, so that results do not depend
    on the device.
    """
    return score.sort(descending=True, stable=True).indices[:count]


def best_of(given: RuleInput, count: int, score: Tensor | None = None) -> Tensor:
    """Indices of the `count` most confident candidates; of equals those that torch.topk takes, as
    in the published programs.

    Which those are depends on where they stand in the row that is ranked. Confidences are equal
    where guidance, top_k or top_p makes them 1.
    """
    score = given.confidence if score is None else score
    order = score.sort(descending=True, stable=True).indices
    if given.row is None or count >= len(order) or score[order[count - 1]] != score[order[count]]:
        return order[:count]
    first, length = given.row
    places = torch.tensor(given.positions) + first
    row = score.new_full((length,), -torch.inf)
    row[places] = score
    candidates = torch.zeros(length, dtype=torch.int64)
    candidates[places] = torch.arange(len(score))
    return candidates[row.topk(count).indices]


def at_least_best(passed: Tensor, confidence: Tensor) -> Tensor:
    """Indices where `passed`, or of the highest confidence when none did."""
    picked = passed.nonzero().flatten()
    return picked if len(picked) else best(confidence, 1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform numbers."""
    return -torch.log(-torch.log(uniform))
