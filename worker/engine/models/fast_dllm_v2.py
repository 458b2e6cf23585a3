"""Fast-dLLM v2: Qwen2's layers, block-causal, logits shifted inside a block;
https://arxiv.org/abs/2509.26328.

Position i is predicted by row i - 1 of its own block. The first position of a block has no such
row: the forward that stores the block before gives its token (`ModelConfig.seeded`). A block is
filled sub-block by sub-block, from left to right.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared.algorithms import BLOCK
from worker.engine.config import ModelConfig, RawConfig, llama_like
from worker.engine.models.family import Family, Names, Source, sources

SUB_BLOCK_LENGTH = 8  # of the published program; config.json does not name one


def config(raw: RawConfig) -> ModelConfig:
    """Read a config.json of Fast_dLLM_QwenForCausalLM."""
    raw.only(hidden_act="silu", use_sliding_window=False, use_mrope=False)
    length = raw.integer("bd_size", 32)
    return llama_like(
        raw,
        "fast_dllm_v2",
        regime=BLOCK,
        qkv_bias=True,
        shift=True,
        seeded=True,
        strict_threshold=True,
        stops_in_block=True,
        block_length=length,
        # the model attends in blocks of this length, whatever is asked for
        max_block_length=length,
        sub_block_length=SUB_BLOCK_LENGTH,
        caches=("exact", "dual", "none"),
        algorithms=("threshold", "factor", "entropy_bound"),
        defaults={"algorithm": "threshold", "threshold": 0.9},
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, Names())


FAMILY = Family(
    name="fast_dllm_v2",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    config=config,
    sources=tensors,
    mask_tokens=("|<MASK>|",),
    mask_token_id=151665,
    end_tokens=("<|im_end|>",),
)
