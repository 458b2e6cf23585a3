"""SDAR: Qwen3's layers, block-causal; https://arxiv.org/abs/2510.06303."""

from __future__ import annotations

from collections.abc import Iterator

from shared.algorithms import BLOCK
from worker.engine.config import DINFER_SLACK, ModelConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources


def config(raw: RawConfig) -> ModelConfig:
    raw.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    return llama_like(
        raw,
        "sdar",
        regime=BLOCK,
        threshold_slack=DINFER_SLACK,
        qk_norm=True,
        block_length=raw.integer("block_size", 4),
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="sdar",
    architectures=("SDARForCausalLM",),
    config=config,
    sources=tensors,
    mask_token_id=151669,
    end_tokens=("<|im_end|>",),
)
