"""Stable-DiffCoder: Llama's layers, block-causal in blocks of 4 tokens.

The published remote code is a subclass of transformers' Llama, so `model_type` is `llama`: the
architecture tells it apart. config.json names no mask token; the tokenizer does.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.algorithms import BLOCK
from worker.engine.config import ModelConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources


def config(raw: RawConfig) -> ModelConfig:
    """Read a config.json of StableDiffcoderForCausalLM."""
    raw.only(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    return llama_like(
        raw,
        "stable_diffcoder",
        regime=BLOCK,
        block_length=raw.integer("block_size", 4),
        defaults={"algorithm": "low_confidence"},
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="stable_diffcoder",
    architectures=("StableDiffcoderForCausalLM",),
    config=config,
    sources=tensors,
    mask_tokens=(),
)
