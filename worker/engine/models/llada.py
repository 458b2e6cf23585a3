"""LLaDA's tensor names (LLaDA-8B, LLaDA-1.5), dense and grouped-query; https://arxiv.org/abs/2502.09992."""

from __future__ import annotations

from worker.engine.config import ModelConfig

FAMILY = "llada"
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>")
MASK_TOKEN_ID = 126336  # of the published checkpoints, when nothing else says
END_OF_TURN_TOKEN = "<|eot_id|>"

_LAYER = {
    "attn_norm": "attn_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "attn_out",
    "ff_norm": "ff_norm",
    "gate_proj": "ff_proj",
    "up_proj": "up_proj",
    "down_proj": "ff_out",
}


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter name -> the checkpoint's tensor name."""
    names = {"embedding.weight": "model.transformer.wte.weight", "norm.weight": "model.transformer.ln_f.weight"}
    if not config.tied:
        names["head.weight"] = "model.transformer.ff_out.weight"
    for layer in range(config.layers):
        for ours, theirs in _LAYER.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.transformer.blocks.{layer}.{theirs}.weight"
    return names
