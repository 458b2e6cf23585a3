"""LLaDA-MoE: OLMoE-like layers, per-head q/k norm, softmax router without renormalisation;
https://arxiv.org/abs/2509.24389.

Its config.json says `model_type: llada` like the dense model's: the architecture tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from worker.engine.config import ModelConfig, MoEConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources


def config(raw: RawConfig) -> ModelConfig:
    raw.only(
        hidden_act="silu",
        attention_bias=False,
        qk_layernorm=True,
        moe_router_score_function="softmax",
        clip_qkv=None,
        moe_router_enable_expert_bias=False,
        partial_rotary_factor=1,
        routed_scaling_factor=1,
        shared_expert_intermediate_size=0,
    )
    raw.only(moe_layer_freq=[1] * raw.integer("num_hidden_layers"))
    moe = MoEConfig(
        experts=raw.integer("num_experts"),
        top_k=raw.integer("num_experts_per_tok"),
        width=raw.integer("expert_intermediate_size"),
        normalize=bool(raw.get("norm_topk_prob", False)),
    )
    return llama_like(
        raw,
        "llada_moe",
        mlp_width=raw.integer("dense_intermediate_size", 0, least=0),
        qk_norm=True,
        moe=moe,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="llada_moe",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    config=config,
    sources=tensors,
    mask_token_id=156895,
)
