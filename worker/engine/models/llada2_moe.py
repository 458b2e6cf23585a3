"""LLaDA2.0 and 2.1 (mini, flash): block-causal, grouped sigmoid router, partial rotary;
https://arxiv.org/abs/2512.15745.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.algorithms import BLOCK
from worker.engine.config import DINFER_SLACK, ModelConfig, MoEConfig, RawConfig, llama_like
from worker.engine.models.family import Family, LayerNames, Names, Source, sources

NAMES = Names(
    embedding="model.word_embeddings",
    inside=LayerNames(
        qkv="attention.query_key_value",
        q_norm="attention.query_layernorm",
        k_norm="attention.key_layernorm",
        attn_out="attention.dense",
    ),
)


def config(raw: RawConfig) -> ModelConfig:
    raw.only(
        hidden_act="silu",
        use_bias=False,
        use_qkv_bias=False,
        use_qk_norm=True,
        use_rmsnorm=True,
        norm_head=False,
        score_function="sigmoid",
        use_sliding_window=False,
    )
    head_dim = raw.integer(
        "head_dim", raw.integer("hidden_size") // raw.integer("num_attention_heads")
    )
    expert_width = raw.integer("moe_intermediate_size")
    moe = MoEConfig(
        experts=raw.integer("num_experts"),
        top_k=raw.integer("num_experts_per_tok"),
        width=expert_width,
        shared_width=expert_width * raw.integer("num_shared_experts", 0, least=0),
        score="sigmoid",
        normalize=bool(raw.get("norm_topk_prob", True)),
        scale=raw.number("routed_scaling_factor", 1.0),
        groups=raw.integer("n_group", 1),
        top_groups=raw.integer("topk_group", 1),
        selection_bias=bool(raw.get("moe_router_enable_expert_bias", False)),
        dense_layers=frozenset(range(raw.integer("first_k_dense_replace", 0, least=0))),
    )
    return llama_like(
        raw,
        "llada2_moe",
        regime=BLOCK,
        threshold_slack=DINFER_SLACK,
        rotary_dim=raw.integer("rotary_dim", int(head_dim * raw.rotary_share)),
        qk_norm=True,
        block_length=raw.integer("block_size", 32),
        moe=moe,
        defaults={"threshold": 0.95},
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, NAMES)


FAMILY = Family(
    name="llada2_moe",
    architectures=("LLaDA2MoeModelLM",),
    config=config,
    sources=tensors,
    mask_token_id=156895,
)
