"""The number of tokens that each step of a block commits, for the rules with a quota. No torch.

Steps that would commit nothing are left out: they cannot change anything, so no forward is spent on
them.
"""

from __future__ import annotations

import numpy as np

from shared.algorithms import FULL
from shared.diffusion_params import DiffusionParams

DREAM_RULES = ("maskgit_plus", "topk_margin", "entropy", "origin")


def even(length: int, steps: int) -> list[int]:
    """length // steps each, the first ones take the remainder (LLaDA's schedule)."""
    base, extra = divmod(length, steps)
    return [base + (i < extra) for i in range(steps) if base + (i < extra)]


def times(steps: int, eps: float) -> list[np.float32]:
    """Dream's times from 1 down to eps, `steps` + 1 of them, in float32 as torch.linspace computes
    them: from both ends, each with one rounding.
    """
    start, end = np.float32(1.0), np.float32(eps)
    step = float(np.float32((end - start) / np.float32(steps)))
    half = (steps + 1) // 2
    return [
        np.float32(float(start) + step * i)
        if i < half
        else np.float32(float(end) - step * (steps - i))
        for i in range(steps + 1)
    ]


def dream(masked: int, steps: int, eps: float) -> list[int]:
    """Dream's schedule: of the masks that are left, the share 1 - s/t; the last step takes the
    rest.
    """
    quotas, time = [], times(steps, eps)
    for i in range(steps):
        share = np.float32(1.0) - time[i + 1] / time[i]
        quota = masked if i == steps - 1 else int(np.float32(masked) * share)
        masked -= quota
        if quota:
            quotas.append(quota)
    return quotas


def quotas(
    params: DiffusionParams, regime: str, masked: int, length: int, blocks: int
) -> list[int]:
    """Quotas of one block's steps; the last one repeats should masks be left.

    Args:
        masked: masked positions of the block when it opens.
        length: positions of the block.
        blocks: blocks of the answer.
    """
    assert params.algorithm is not None
    if params.algorithm in DREAM_RULES:
        steps = masked if params.steps is None else max(1, params.steps // blocks)
        return dream(masked, steps, params.eps or 1e-3)
    if params.tokens_per_step is not None:
        return [params.tokens_per_step]
    if regime == FULL:
        steps = masked if params.steps is None else max(1, params.steps // blocks)
        return even(masked, steps)
    if params.algorithm == "low_confidence":
        # Stable-DiffCoder's schedule: over the masks of this very block.
        return (
            even(masked, max(1, min(params.denoising_steps or length, length))) if masked else [1]
        )
    # The other block-causal programs count the schedule over the whole block, also where a part of
    # it is prompt.
    return even(length, min(params.denoising_steps or length, length))
