"""The interface of a family: how to read a config.json, and where each tensor of the checkpoint
goes in our transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from worker.engine.config import ModelConfig, RawConfig

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint and the part of our parameter that it fills."""

    name: str
    target: str
    at: Index = ()  # index into the target; () is all of it
    optional: bool = False


def _any(raw: RawConfig) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Family:
    """One family of checkpoints. `config` raises ModelLoadError for what is not supported.

    Several families may share an architecture's name. `matches` then tells them apart by other keys
    of config.json.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[RawConfig], ModelConfig]
    sources: Callable[[ModelConfig], Iterator[Source]]
    mask_tokens: tuple[str, ...] = ("<|mask|>", "<|mdm_mask|>")
    mask_token_id: int | None = None  # of the published checkpoints, when nothing else says
    end_tokens: tuple[str, ...] = ()  # that end an answer beside eos
    matches: Callable[[RawConfig], bool] = _any
    # whether a key that nobody reads may change the mathematics; not where other code reads it
    strict: bool = True

    def read(self, raw: RawConfig) -> ModelConfig:
        """Return the facts of a config.json. Raises ModelLoadError, also for a key that this family
        does not read and that changes the mathematics.
        """
        raw.read |= {
            "quantization_config",
            "llada_fp8_experts",
            "use_fp8_experts",
        }  # `worker.engine.quantized` reads them
        facts = self.config(raw)
        if self.strict:
            raw.refuse_unread(self.name)
        return facts


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Names inside one layer, as most checkpoints of Llama's kind have them."""

    attn_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None  # one fused tensor [q | k | v] instead of three
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attn_out: str = "self_attn.o_proj"
    ff_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.expert_bias"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a whole checkpoint."""

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers"
    inside: LayerNames = LayerNames()


def sources(config: ModelConfig, names: Names) -> Iterator[Source]:
    """Every tensor that a checkpoint of this configuration must have."""
    yield Source(f"{names.embedding}.weight", "embedding.weight")
    yield Source(f"{names.norm}.weight", "norm.weight")
    if config.tied:
        yield Source(
            f"{names.head}.weight", "", optional=True
        )  # some files repeat the embedding here
    else:
        yield Source(f"{names.head}.weight", "head.weight")
    for i in range(config.layers):
        yield from _layer(config, names.inside, f"{names.layer}.{i}.", f"layers.{i}.", i)


def _layer(
    config: ModelConfig, n: LayerNames, theirs: str, ours: str, index: int
) -> Iterator[Source]:
    yield Source(f"{theirs}{n.attn_norm}.weight", f"{ours}attn_norm.weight")
    yield Source(f"{theirs}{n.ff_norm}.weight", f"{ours}ff_norm.weight")
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        if n.qkv is not None:
            yield Source(f"{theirs}{n.qkv}.{kind}", f"{ours}qkv.{kind}")
            continue
        for name, rows in (
            (n.q, slice(0, q)),
            (n.k, slice(q, q + kv)),
            (n.v, slice(q + kv, q + 2 * kv)),
        ):
            yield Source(f"{theirs}{name}.{kind}", f"{ours}qkv.{kind}", (rows,))
    if config.qk_norm:
        yield Source(f"{theirs}{n.q_norm}.weight", f"{ours}q_norm.weight")
        yield Source(f"{theirs}{n.k_norm}.weight", f"{ours}k_norm.weight")
    yield Source(f"{theirs}{n.attn_out}.weight", f"{ours}attn_out.weight")
    moe = config.moe
    if moe is None or index in moe.dense_layers:
        yield from _mlp(
            f"{theirs}{n.gate}",
            f"{theirs}{n.up}",
            f"{theirs}{n.down}",
            f"{ours}mlp.",
            config.mlp_width,
        )
        return
    yield Source(f"{theirs}{n.router}.weight", f"{ours}mlp.router.weight")
    if moe.selection_bias:
        yield Source(f"{theirs}{n.router_bias}", f"{ours}mlp.selection_bias")
    low, high = slice(0, moe.width), slice(moe.width, 2 * moe.width)
    for e in range(moe.experts):
        yield Source(f"{theirs}{n.experts}.{e}.gate_proj.weight", f"{ours}mlp.gate_up", (e, low))
        yield Source(f"{theirs}{n.experts}.{e}.up_proj.weight", f"{ours}mlp.gate_up", (e, high))
        yield Source(f"{theirs}{n.experts}.{e}.down_proj.weight", f"{ours}mlp.down", (e,))
    if moe.shared_width:
        shared = f"{theirs}{n.shared}"
        yield from _mlp(
            f"{shared}.gate_proj",
            f"{shared}.up_proj",
            f"{shared}.down_proj",
            f"{ours}mlp.shared.",
            moe.shared_width,
        )


def _mlp(gate: str, up: str, down: str, ours: str, width: int) -> Iterator[Source]:
    yield Source(f"{gate}.weight", f"{ours}gate_up.weight", (slice(0, width),))
    yield Source(f"{up}.weight", f"{ours}gate_up.weight", (slice(width, 2 * width),))
    yield Source(f"{down}.weight", f"{ours}down.weight")
