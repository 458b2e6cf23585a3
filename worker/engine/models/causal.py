"""Autoregressive models for the verifier of APD: Llama's layout, Qwen2's (biases) and Qwen3's (q/k
norm).
"""

from __future__ import annotations

from collections.abc import Iterator

from worker.engine.config import ModelConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources

CAUSAL = "causal"


def config(raw: RawConfig) -> ModelConfig:
    raw.only(hidden_act="silu", use_sliding_window=False, mlp_bias=False)
    qwen2 = raw.architecture == "Qwen2ForCausalLM"
    if not qwen2:
        raw.only(attention_bias=False)
    return llama_like(
        raw, CAUSAL, regime=CAUSAL, qkv_bias=qwen2, qk_norm=raw.architecture == "Qwen3ForCausalLM"
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name=CAUSAL,
    architectures=("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    config=config,
    sources=tensors,
)
