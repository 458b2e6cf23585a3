"""SDAR: Qwen3's layers, block-causal; https://arxiv.org/abs/2510.06303."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shared.algorithms import BLOCK
from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, Names, Source, sources


def config(path: Path) -> ModelConfig:
    raw = RawConfig(path)
    raw.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    heads, width = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    return ModelConfig(
        architecture=raw.architecture,
        family="sdar",
        width=width,
        layers=raw.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=raw.integer("head_dim", width // heads),
        mlp_width=raw.integer("intermediate_size"),
        vocab_size=raw.integer("vocab_size"),
        context_length=raw.integer("max_position_embeddings"),
        rope_theta=raw.rope_theta,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        regime=BLOCK,
        qk_norm=True,
        block_length=raw.integer("block_size", 4),
        mask_token_id=raw.get("mask_token_id"),
        eos_token_ids=raw.eos,
        generation=raw.generation,
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
