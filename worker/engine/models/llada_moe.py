"""LLaDA-MoE: OLMoE-like layers, per-head q/k norm, softmax router without renormalisation; https://arxiv.org/abs/2509.24389.

Its config.json says `model_type: llada` like the dense model's: the architecture tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from worker.engine.config import ModelConfig, MoEConfig, RawConfig
from worker.engine.models.family import Family, Names, Source, sources


def config(path: Path) -> ModelConfig:
    raw = RawConfig(path)
    raw.only(
        hidden_act="silu", attention_bias=False, qk_layernorm=True, moe_router_score_function="softmax", clip_qkv=None,
        moe_router_enable_expert_bias=False, partial_rotary_factor=1, routed_scaling_factor=1,
        shared_expert_intermediate_size=0,
    )  # fmt: skip
    heads, width, layers = (
        raw.integer("num_attention_heads"),
        raw.integer("hidden_size"),
        raw.integer("num_hidden_layers"),
    )
    raw.only(moe_layer_freq=[1] * layers)
    return ModelConfig(
        architecture=raw.architecture,
        family="llada_moe",
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=raw.integer("head_dim", width // heads),
        mlp_width=raw.integer("dense_intermediate_size", 0),
        vocab_size=raw.integer("vocab_size"),
        context_length=raw.integer("max_position_embeddings"),
        rope_theta=raw.rope_theta,
        norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=True,
        moe=MoEConfig(
            experts=raw.integer("num_experts"),
            top_k=raw.integer("num_experts_per_tok"),
            width=raw.integer("expert_intermediate_size"),
            normalize=bool(raw.get("norm_topk_prob", False)),
        ),
        mask_token_id=raw.get("mask_token_id"),
        eos_token_ids=raw.eos,
        generation=raw.generation,
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
