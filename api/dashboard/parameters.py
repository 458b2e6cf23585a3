"""Words for the unmasking rules and their parameters, so that a form can explain itself."""

from __future__ import annotations

from typing import Any

from shared.algorithms import ALGORITHMS, own_parameters
from shared.algorithms import PARAMETERS as OWN
from shared.diffusion_params import DIFFUSION_FIELDS

RULES = {
    "low_confidence": "The most confident tokens first, as many in each step as the number of steps demands.",
    "random": "Positions at random, as many in each step as the number of steps demands.",
    "threshold": "Every token whose confidence reaches the threshold, at least one a step.",
    "factor": "As many tokens as their joint confidence allows; adapts from step to step.",
    "maskgit_plus": "The likeliest tokens first, over a schedule of noise levels.",
    "topk_margin": "First the positions where the best token is furthest ahead of the second best.",
    "entropy": "First the positions whose distribution is the sharpest.",
    "origin": "Positions at random, over a schedule of noise levels.",
    "entropy_bound": "As many tokens as their joint entropy allows.",
    "hierarchical": "Confident tokens first, spread out over the block, so that neighbours wait for each other.",
    "credit": "Like threshold; a token that was right in earlier steps gets credit.",
    "klass": "Tokens whose distribution has stopped moving between steps.",
    "low_confidence_dynamic": "Within a block, every token above the threshold, at least one a step.",
    "low_confidence_static": "Within a block, as many of the most confident tokens as denoising_steps demands.",
    "joint_threshold": "Commits and corrects: a token may be replaced while the model is surer of another.",
    "renoise": "Starts from noise instead of masks, and throws out again what does not hold.",
    "apd": "Adaptive Parallel Decoding: a small autoregressive model checks how many tokens may be taken at once.",
    "sequential": "Left to right, a fixed number in each step.",
}

# name -> (kind, what it means); beside the rules' own, those that every rule reads
PARAMETERS: dict[str, tuple[str, str]] = {
    "steps": (
        "integer",
        "Denoising steps of the whole answer. Fewer is faster; one per token is the most careful.",
    ),
    "block_length": (
        "integer",
        "Tokens decoded together before the next block opens. Must divide max_tokens.",
    ),
    "sub_block_length": (
        "integer",
        "Tokens of the parts that a block is filled in. Must divide block_length.",
    ),
    "threshold": (
        "number",
        "Above 0, up to 1. A token is committed once the model is this sure. Lower is faster.",
    ),
    "factor": (
        "number",
        "Above 0. How much joint uncertainty a step may take on. Higher is faster.",
    ),
    "cfg_scale": (
        "number",
        "Classifier-free guidance: how strongly the answer follows the prompt. Above 0 doubles the work.",
    ),
    "cache": ("choice", "What is kept between steps instead of being computed again."),
    "suppress_end": (
        "choice",
        "Keeps the answer from ending early: never choose the end token, or choose it last.",
    ),
    "suppress_token_ids": ("list", "Which tokens suppress_end means."),
    "denoising_steps": ("integer", "Steps for each block."),
    "tokens_per_step": ("integer", "Tokens committed in each step."),
    "low_threshold": (
        "number",
        "Of each run of neighbouring masks the best is taken above this confidence.",
    ),
    "credit_alpha": ("number", "How much a token gains by having been on top before."),
    "gamma": ("number", "How much entropy, in nats, a step may take on. Higher is faster."),
    "eps": ("number", "The smallest noise level of the schedule."),
    "alg_temp": ("number", "Randomness in the order of unmasking."),
    "edit_threshold": (
        "number",
        "A committed token may be replaced when the model is this sure of another.",
    ),
    "max_post_edit_steps": ("integer", "Steps that only correct, after everything is committed."),
    "max_denoising_steps": ("integer", "At most this many steps for a canvas."),
    "t_min": ("number", "The temperature of the last steps."),
    "t_max": ("number", "The temperature of the first steps."),
    "entropy_bound": ("number", "A token is committed while the step's entropy stays below this."),
    "stability_threshold": (
        "integer",
        "Steps for which the canvas must stay the same before it is committed.",
    ),
    "confidence_threshold": (
        "number",
        "Mean entropy, in nats, below which a canvas that stands still is committed.",
    ),
    "draft_token_ids": ("list", "An earlier answer to start from."),
    "draft_noise": ("number", "The share of the draft that is masked again."),
    "max_forwards": (
        "integer",
        "The answer ends after so many model calls, with what is committed by then.",
    ),
    "mixture_weight": (
        "number",
        "From 0 to 1: the share of the diffusion model against the verifier. Higher is faster.",
    ),
    "kv_window": ("integer", "Positions that are computed anew each step."),
    "max_lookahead": ("integer", "At most so many tokens are proposed at once."),
}
_FORM_LEAVES_OUT = (
    "algorithm",
    "visualize",
    "suppress_token_ids",
    "apd",
    "draft_token_ids",
    "draft_noise",
)
_CHOICES = {"suppress_end": ["logits", "confidence"]}


def rules() -> list[dict[str, Any]]:
    """Every rule with the parameters that it reads."""
    common = [name for name in DIFFUSION_FIELDS if name not in OWN and name not in _FORM_LEAVES_OUT]

    def described(name: str) -> dict[str, Any]:
        kind, words = PARAMETERS.get(name, ("text", ""))
        return {"name": name, "kind": kind, "choices": _CHOICES.get(name), "help": words}

    made = []
    for rule, algorithm in ALGORITHMS.items():
        names = dict.fromkeys(
            name for regime in algorithm.regimes for name in own_parameters(rule, regime)
        )
        parameters = [described(name) for name in (*names, *common)]
        made.append({"name": rule, "help": RULES.get(rule, ""), "parameters": parameters})
    return made
