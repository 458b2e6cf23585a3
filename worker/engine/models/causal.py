"""Autoregressive models for the verifier of APD: Llama's layout, Qwen2's (biases) and Qwen3's (q/k norm)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, Names, Source, sources

CAUSAL = "causal"


def config(path: Path) -> ModelConfig:
    raw = RawConfig(path)
    raw.only(hidden_act="silu", use_sliding_window=False, mlp_bias=False)
    qwen2 = raw.architecture == "Qwen2ForCausalLM"
    if not qwen2:
        raw.only(attention_bias=False)
    heads, width = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    return ModelConfig(
        architecture=raw.architecture,
        family=CAUSAL,
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
        regime=CAUSAL,
        qkv_bias=qwen2,
        qk_norm=raw.architecture == "Qwen3ForCausalLM",
        eos_token_ids=raw.eos,
        generation=raw.generation,
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name=CAUSAL,
    architectures=("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    config=config,
    sources=tensors,
)
