"""The protocol of a rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shared.sampling_params import DiffusionParams


@dataclass(frozen=True, slots=True)
class RuleInput:
    """What a rule sees of one answer's open block; n masked positions, left to right."""

    confidence: Tensor  # [n] float32, probability of the chosen token
    quota: int  # tokens this step should commit, at least 1, at most n
    params: DiffusionParams
    uniform: Callable[[], Tensor]  # [n] float32 in (0, 1), a function of (seed, step, position) alone


class Rule(Protocol):
    """Returns the indices [k] to commit, 1 <= k <= n."""

    @property
    def name(self) -> str: ...

    def select(self, given: RuleInput) -> Tensor: ...


def best(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores; of equals the leftmost, so that results do not depend on the device."""
    return score.sort(descending=True, stable=True).indices[:count]
