"""Dream-7B and DiffuCoder: Qwen2's layers with full attention, logits shifted by one;
https://arxiv.org/abs/2508.15487.
"""

from __future__ import annotations

from collections.abc import Iterator

from worker.engine.config import ModelConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources


def config(raw: RawConfig) -> ModelConfig:
    raw.only(hidden_act="silu", use_sliding_window=False, use_mrope=False)
    return llama_like(
        raw,
        "dream",
        qkv_bias=True,
        shift=True,
        block_length=None,  # Dream has no blocks: the whole answer is one
        defaults={"algorithm": "entropy"},
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
