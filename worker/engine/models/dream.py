"""Dream-7B and DiffuCoder: Qwen2's layers with full attention, logits shifted by one; https://arxiv.org/abs/2508.15487."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, Names, Source, sources


def config(path: Path) -> ModelConfig:
    raw = RawConfig(path)
    raw.only(hidden_act="silu", use_sliding_window=False, use_mrope=False)
    heads, width = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    return ModelConfig(
        architecture=raw.architecture,
        family="dream",
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
        qkv_bias=True,
        shift=True,
        block_length=None,  # Dream has no blocks: the whole answer is one
        mask_token_id=raw.get("mask_token_id"),
        eos_token_ids=raw.eos,
        defaults={"algorithm": "entropy"},
        generation=raw.generation,
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="dream",
    architectures=("DreamModel",),
    config=config,
    sources=tensors,
    mask_token_id=151666,
    end_tokens=("<|im_end|>",),
)
