"""The decoding algorithms by name: their own parameters with defaults and bounds, and the model
regimes they run on.

Vocabulary that the API validates with and the engine decodes by; what each algorithm does is in
`worker.engine.rules`, `worker.engine.apd` and `worker.engine.renoise`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL, BLOCK, UNIFORM = "full", "block_causal", "uniform"
"""Regimes: masked with full attention (LLaDA, Dream), masked block by block (SDAR, LLaDA2), uniform noise (DiffusionGemma)."""

MONTE_CARLO, CHAIN_RULE = "monte_carlo", "chain_rule"
"""Ways to say how likely a text is; see `worker.engine.likelihood`."""

CACHES: dict[str, tuple[str, ...]] = {
    FULL: ("none", "prefix", "dual", "window"),
    BLOCK: ("exact", "none"),
    UNIFORM: ("exact",),
}
"""K/V caches per regime; the first is the default."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Bounds of one parameter. `integer` ones are whole numbers; `open_low` excludes the lower
    bound.
    """

    low: float
    high: float
    integer: bool = False
    open_low: bool = False


PARAMETERS: dict[str, Parameter] = {
    "steps": Parameter(1, 1_000_000, integer=True),
    "denoising_steps": Parameter(1, 1_000_000, integer=True),
    "tokens_per_step": Parameter(1, 4096, integer=True),
    "threshold": Parameter(0, 1, open_low=True),
    "low_threshold": Parameter(0, 1),
    "factor": Parameter(0, 64, open_low=True),
    "gamma": Parameter(0, 1000),
    "eps": Parameter(0, 1, open_low=True),
    "alg_temp": Parameter(0, 100),
    "credit_alpha": Parameter(0, 100),
    "edit_threshold": Parameter(0, 1),
    "max_post_edit_steps": Parameter(0, 4096, integer=True),
    "mixture_weight": Parameter(0, 1),
    "kv_window": Parameter(1, 1_000_000, integer=True),
    "max_lookahead": Parameter(1, 1_000_000, integer=True),
    "max_denoising_steps": Parameter(1, 4096, integer=True),
    "t_min": Parameter(0, 10, open_low=True),
    "t_max": Parameter(0, 10, open_low=True),
    "entropy_bound": Parameter(0, 1000),
    "stability_threshold": Parameter(0, 4096, integer=True),
    "confidence_threshold": Parameter(0, 1000),
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm.

    `parameters` maps its own parameters to their defaults; None means "not used unless given" or,
    for steps, one token per step. `window`: it decodes left to right and may read a window of K/V
    (`kv_window`) instead of blocks.
    """

    regimes: tuple[str, ...]
    parameters: dict[str, Any]
    verifier: bool = False
    window: bool = False
    cfg: bool = True  # classifier-free guidance
    by_confidence: bool = (
        True  # whether the model's confidence decides which positions are committed
    )


_MASKED = (FULL, BLOCK)
_DREAM: dict[str, Any] = {"steps": None, "alg_temp": 0.0, "eps": 1e-3}

ALGORITHMS: dict[str, Algorithm] = {
    "low_confidence": Algorithm(_MASKED, {"steps": None, "denoising_steps": None}),
    "random": Algorithm((FULL,), {"steps": None}, by_confidence=False),
    "maskgit_plus": Algorithm((FULL,), _DREAM),
    "topk_margin": Algorithm((FULL,), _DREAM),
    "entropy": Algorithm((FULL,), _DREAM),
    "origin": Algorithm((FULL,), {"steps": None, "eps": 1e-3}, by_confidence=False),
    "threshold": Algorithm(_MASKED, {"threshold": 0.9}),
    "factor": Algorithm(_MASKED, {"factor": 1.0}),
    "entropy_bound": Algorithm(_MASKED, {"gamma": 0.1}),
    "hierarchical": Algorithm(_MASKED, {"threshold": 0.9, "low_threshold": 0.4}),
    "credit": Algorithm(_MASKED, {"threshold": 0.9, "credit_alpha": 0.7}),
    "klass": Algorithm(_MASKED, {"threshold": 0.9, "tokens_per_step": 1}),
    "sequential": Algorithm(
        _MASKED,
        {"tokens_per_step": 1, "denoising_steps": None, "kv_window": None, "max_lookahead": None},
        window=True,
        by_confidence=False,
    ),
    "low_confidence_dynamic": Algorithm((BLOCK,), {"threshold": 0.9, "denoising_steps": None}),
    "low_confidence_static": Algorithm((BLOCK,), {"denoising_steps": None}),
    "joint_threshold": Algorithm(
        (BLOCK,),
        {"threshold": 0.95, "edit_threshold": 0.9, "max_post_edit_steps": 16, "tokens_per_step": 1},
    ),
    "apd": Algorithm(
        (FULL,),
        {"mixture_weight": 0.7, "kv_window": None, "max_lookahead": None},
        verifier=True,
        window=True,
        cfg=False,
    ),
    "renoise": Algorithm(
        (UNIFORM,),
        {
            "max_denoising_steps": 48,
            "t_min": 0.4,
            "t_max": 0.8,
            "entropy_bound": 0.1,
            "stability_threshold": 1,
            "confidence_threshold": 0.005,
        },
        cfg=False,
    ),
}

DEFAULT_ALGORITHM = {FULL: "low_confidence", BLOCK: "low_confidence_dynamic", UNIFORM: "renoise"}


def own_parameters(name: str, regime: str) -> dict[str, Any]:
    """The parameters that algorithm `name` reads on models of `regime`, with their defaults."""
    own = dict(ALGORITHMS[name].parameters)
    if regime == FULL:
        own.pop("denoising_steps", None)
    elif name == "low_confidence":
        del own["steps"]
    elif name == "sequential":
        own = {"tokens_per_step": None, "denoising_steps": None}
    return own


def algorithms_of(regime: str, *, verifier: bool) -> tuple[str, ...]:
    """Names of the algorithms that a model of `regime` can run, with or without a verifier beside
    it.
    """
    return tuple(
        name
        for name, a in ALGORITHMS.items()
        if regime in a.regimes and (verifier or not a.verifier)
    )


def users_of(parameter: str, regime: str) -> tuple[str, ...]:
    """Algorithms of a regime that read a parameter."""
    return tuple(
        name
        for name, a in ALGORITHMS.items()
        if regime in a.regimes and parameter in own_parameters(name, regime)
    )
