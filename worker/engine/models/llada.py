"""LLaDA-8B, LLaDA-1.5 and their grouped-query kin; https://arxiv.org/abs/2502.09992."""

from __future__ import annotations

from collections.abc import Iterator

from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, LayerNames, Names, Source, sources

NAMES = Names(
    embedding="model.transformer.wte",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer="model.transformer.blocks",
    inside=LayerNames(
        attn_norm="attn_norm",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        attn_out="attn_out",
        ff_norm="ff_norm",
        gate="ff_proj",
        up="up_proj",
        down="ff_out",
    ),
)


def config(raw: RawConfig) -> ModelConfig:
    raw.only(
        alibi=False,
        input_emb_norm=False,
        scale_logits=False,
        include_bias=False,
        include_qkv_bias=False,
        attention_layer_norm=False,
        rope=True,
        layer_norm_type="rms",
        activation_type="silu",
        block_type="llama",
    )
    heads, width = raw.integer("n_heads"), raw.integer("d_model")
    return ModelConfig(
        architecture=raw.architecture,
        family="llada",
        width=width,
        layers=raw.integer("n_layers"),
        heads=heads,
        kv_heads=raw.integer("n_kv_heads", heads),
        head_dim=width // heads,
        mlp_width=raw.integer("mlp_hidden_size")
        if raw.get("mlp_hidden_size")
        else width * raw.integer("mlp_ratio"),
        vocab_size=raw.integer("embedding_size" if raw.get("embedding_size") else "vocab_size"),
        context_length=raw.integer("max_sequence_length"),
        rope_theta=raw.rope_theta,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        tied=bool(raw.get("weight_tying", False)),
        mask_token_id=raw.mask,
        eos_token_ids=raw.eos,
        generation=raw.generation,
    )


def tensors(facts: ModelConfig) -> Iterator[Source]:
    return sources(facts, NAMES)


FAMILY = Family(
    name="llada",
    architectures=("LLaDAModelLM",),
    config=config,
    sources=tensors,
    mask_tokens=("<|mdm_mask|>", "<|mask|>"),
    mask_token_id=126336,
    end_tokens=("<|eot_id|>",),
)
