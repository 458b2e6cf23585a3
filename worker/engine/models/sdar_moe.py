"""SDAR-30B-A3B: Qwen3-MoE's layers, block-causal; https://arxiv.org/abs/2510.06303.

The published remote code's defaults must not be relied on (`norm_topk_prob` is false there, and
true in the base model's file):
every value is read from config.json.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.algorithms import BLOCK
from worker.engine.config import DINFER_SLACK, ModelConfig, MoEConfig, RawConfig, llama_like
from worker.engine.models import sdar
from worker.engine.models.family import Family, Names, Source, sources


def config(raw: RawConfig) -> ModelConfig:
    """Read a config.json of SDARMoeForCausalLM."""
    raw.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    moe = MoEConfig(
        experts=raw.integer("num_experts"),
        top_k=raw.integer("num_experts_per_tok"),
        width=raw.integer("moe_intermediate_size"),
        normalize=raw.flag("norm_topk_prob"),
        dense_layers=raw.dense_layers(),
    )
    return llama_like(
        raw,
        "sdar_moe",
        regime=BLOCK,
        threshold_slack=DINFER_SLACK,
        qk_norm=True,
        block_length=raw.integer("block_size", 4),
        moe=moe,
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="sdar_moe",
    architectures=("SDARMoeForCausalLM",),
    config=config,
    sources=tensors,
    mask_token_id=sdar.FAMILY.mask_token_id,
    end_tokens=sdar.FAMILY.end_tokens,
)
