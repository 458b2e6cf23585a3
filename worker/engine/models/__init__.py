"""One transformer; a thin file per family maps config.json and tensor names onto it.
`docs/add-a-model.md` says how.
"""

from __future__ import annotations

from shared.errors import ModelLoadError
from worker.engine.config import RawConfig
from worker.engine.models import (
    diffusion_gemma,
    dream,
    fast_dllm_v2,
    llada,
    llada2_moe,
    llada_moe,
    sdar,
    sdar_moe,
    stable_diffcoder,
)
from worker.engine.models.family import Family

FAMILIES: tuple[Family, ...] = (
    llada.FAMILY,
    dream.FAMILY,
    llada_moe.FAMILY,
    llada2_moe.FAMILY,
    sdar.FAMILY,
    sdar_moe.FAMILY,
    stable_diffcoder.FAMILY,
    fast_dllm_v2.FAMILY,
)
"""Those that our own transformer computes."""

BUILT_IN = (*FAMILIES, diffusion_gemma.FAMILY)
KNOWN = tuple(dict.fromkeys(a for family in BUILT_IN for a in family.architectures))
"""Every architecture that is built in, as config.json names it."""

REFUSED: dict[str, str] = {
    "I-DLM": "introspective decoding needs strictly causal attention and shifted logits",
    "LLaDA2.2": "block routing and edit tokens change every forward and every step",
}
"""Checkpoints that carry the tag of a built-in family and need another computation, with the reason."""


def _refused(raw: RawConfig) -> str | None:
    """Return the name in REFUSED of a checkpoint that only looks like a built-in family."""
    if raw.architecture == "SDARForCausalLM" and (
        raw.get("use_regular_causal") or raw.get("block_size") == 1
    ):
        return "I-DLM"
    if raw.architecture == "LLaDA2MoeModelLM" and raw.get("expert_capacity") is not None:
        return "LLaDA2.2"
    return None


def family_of(raw: RawConfig) -> Family:
    """Return the family of a checkpoint, by the facts of its config.json.

    Raises:
        ModelLoadError: naming the architecture that is not built in, or the model that is not
            supported.
    """
    name = _refused(raw)
    if name is not None:
        raise ModelLoadError(
            f"{raw.path}: this is an {name} checkpoint, which is not supported yet: {REFUSED[name]}"
        )
    for family in BUILT_IN:
        if raw.architecture in family.architectures and family.matches(raw):
            return family
    message = (
        f"{raw.path}: architecture {raw.architecture} is not one of {', '.join(KNOWN)}; "
        "--trust-remote-code runs it through transformers, with the code that it brings"
    )
    raise ModelLoadError(message)
