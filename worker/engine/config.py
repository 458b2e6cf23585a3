"""Configuration of the engine, and the facts of a checkpoint. No torch."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.algorithms import BLOCK, FULL
from shared.errors import ConfigurationError, ModelLoadError

DINFER_SLACK = 1e-5
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True, slots=True)
class VDiffConfig:
    """Engine configuration: what to load and how to run it. Values that are not supported are
    refused here, by name.

    Raises:
        ConfigurationError: naming the field.
    """

    model: str  # folder or hub id
    tokenizer: str | None = None
    revision: str | None = None
    served_model_name: str | None = None
    dtype: str = (
        "auto"  # the checkpoint's on accelerators (bfloat16 for float32 ones), float32 on CPU
    )
    device: str = "auto"
    max_num_seqs: int = 8  # sequences per step
    max_model_len: int | None = None  # tokens, prompt and answer
    max_batched_tokens: int = (
        8192  # rows of one step; prompts of block-causal models are cut to fit
    )
    cache_tokens: int | None = (
        None  # K/V capacity of all sequences together, tokens; None: from the memory that is free
    )
    gpu_memory_utilization: float = 0.9  # share of the device's memory for weights and K/V together
    num_threads: int | None = None
    diffusion_steps: int | None = None  # default steps of an answer
    block_size: int | None = None  # default block_length
    quantization: str | None = None  # int8: weights only
    compile: bool = False  # layers fused by torch.compile
    cuda_graphs: bool | None = None  # None: where they work; True: or not at all
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    verifier: str | None = None  # autoregressive model for APD: folder or hub id
    enable_apd: bool | None = None  # None: where there is a verifier; False: none is loaded
    watchdog_seconds: float = (
        120.0  # with work and no step for so long, the engine calls itself unhealthy
    )

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise ConfigurationError(
                "tensor_parallel_size other than 1 is not built yet", param="tensor_parallel_size"
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            known = ", ".join(QUANTIZATIONS)
            raise ConfigurationError(
                f"quantization {self.quantization!r} is not one of {known}", param="quantization"
            )
        if self.enable_apd and self.verifier is None:
            raise ConfigurationError(
                "APD needs a verifier: give one with --verifier", param="enable_apd"
            )
        if self.dtype not in DTYPES:
            raise ConfigurationError(
                f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}", param="dtype"
            )
        for name in (
            "max_num_seqs",
            "max_model_len",
            "max_batched_tokens",
            "cache_tokens",
            "num_threads",
            "diffusion_steps",
            "block_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1", param=name)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigurationError(
                "gpu_memory_utilization must be above 0 and at most 1",
                param="gpu_memory_utilization",
            )
        if self.watchdog_seconds <= 0:
            raise ConfigurationError("watchdog_seconds must be above 0", param="watchdog_seconds")


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A mixture of experts in place of the MLP."""

    experts: int
    top_k: int
    width: int  # of one expert
    shared_width: int = 0  # of the expert that every token passes; 0: none
    score: str = "softmax"  # or "sigmoid"
    normalize: bool = False  # the chosen experts' weights add up to one
    scale: float = 1.0
    groups: int = 1  # experts are chosen inside the best `top_groups` of so many groups
    top_groups: int = 1
    selection_bias: bool = (
        False  # a learned bias that decides who is chosen, not how much they count
    )
    dense_layers: frozenset[int] = frozenset()  # layers with a plain MLP

    def __post_init__(self) -> None:
        """Raises ModelLoadError for what no router can do."""
        if self.experts % self.groups:
            raise ModelLoadError(
                f"{self.experts} experts do not fall into {self.groups} equal groups (n_group)"
            )
        if self.top_groups > self.groups:
            raise ModelLoadError(
                f"topk_group {self.top_groups} is more than n_group, {self.groups}"
            )
        among = self.experts // self.groups * self.top_groups
        if self.top_k > among:
            raise ModelLoadError(
                f"num_experts_per_tok {self.top_k} is more than there are to choose from, {among}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of a checkpoint, as `worker.engine.models.<family>` reads them from its config.json."""

    architecture: str
    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int  # rows of the embedding
    context_length: int
    rope_theta: float
    norm_eps: float
    tied: bool
    regime: str = FULL  # FULL, BLOCK, UNIFORM of `shared.algorithms`, or "causal" (verifiers)
    rotary_dim: int | None = None  # leading dimensions of a head that rotate; None: all
    qkv_bias: bool = False
    qk_norm: bool = False
    shift: bool = False  # row i-1 predicts position i (Dream)
    block_length: int | None = 32  # default, tokens; None: the whole answer
    max_block_length: int | None = None  # that the checkpoint was trained for; None: any
    sub_block_length: int | None = (
        None  # default length of the parts that a block is filled in; None: the whole block
    )
    seeded: bool = (
        False  # the forward that stores a block's K/V also gives the next block's first token
    )
    stops_in_block: bool = False  # an end token ends the answer before its block is complete
    strict_threshold: bool = False  # `threshold` takes what is above it, not what reaches it
    caches: tuple[str, ...] | None = None  # None: those of the regime
    algorithms: tuple[str, ...] | None = None  # None: those of the regime
    threshold_slack: float = (
        0.0  # `threshold` takes what is this close to the best confidence (dInfer)
    )
    moe: MoEConfig | None = None
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)  # diffusion parameters of the family
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json

    @property
    def causal_blocks(self) -> bool:
        return self.regime == BLOCK

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """The facts of a folder's config.json. Raises ModelLoadError naming the file or key."""
        from worker.engine.models import family_of

        raw = RawConfig(Path(folder))
        return family_of(raw).read(raw)


class RawConfig:
    """A config.json while a family reads it: every key that is missing or unsupported is an error
    with its name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, "config.json"
        self.values = read_json(path / "config.json")
        self.generation = read_json(path / "generation_config.json", missing_ok=True)
        self.read: set[str] = set()  # keys that a family has looked at

    def section(self, key: str) -> RawConfig:
        """An object inside the object, read in the same way."""
        values = self[key]
        if not isinstance(values, dict):
            raise ModelLoadError(f"{self.path}: {self.where} has a {key} that is no object")
        inner = copy.copy(self)
        inner.values, inner.where, inner.read = values, f"{self.where}, {key},", set()
        return inner

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures") or []
        return str(names[0]) if names else "none"

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        if self.values.get(key) is None:
            raise ModelLoadError(f"{self.path}: {self.where} lacks {key}")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def _refuse(self, key: str, value: Any, wanted: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self.path}: {self.where} has {key} = {value!r}; {wanted} is wanted"
        )

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self[key] if default is None else self.get(key, default)
        if not _is_number(value) or value != int(value) or value < least:
            raise self._refuse(key, value, f"an integer of at least {least}")
        return int(value)

    def flag(self, key: str) -> bool:
        """Return a required true or false."""
        value = self[key]
        if not isinstance(value, bool):
            raise self._refuse(key, value, "true or false")
        return value

    def dense_layers(self) -> frozenset[int]:
        """Return the layers without experts, as Qwen's MoE files name them (`mlp_only_layers`,
        `decoder_sparse_step`).
        """
        step, listed = self.integer("decoder_sparse_step", 1), self.get("mlp_only_layers", [])
        if not isinstance(listed, list) or not all(_is_id(one) for one in listed):
            raise self._refuse("mlp_only_layers", listed, "a list of layer indices")
        layers = range(self.integer("num_hidden_layers"))
        return frozenset(i for i in layers if i in listed or (i + 1) % step)

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.get(key, default)
        if not _is_number(value) or value <= 0:
            raise self._refuse(key, value, "a number above 0")
        return float(value)

    def only(self, **wanted: Any) -> None:
        """Refuse keys whose value is not the one that is built; absent ones are taken to be it."""
        for key, value in wanted.items():
            given = self.get(key)
            if given is not None and given != value:
                raise ModelLoadError(
                    f"{self.path}: {self.where} has {key} = {given!r}; only {value!r} is supported"
                )

    def refuse_unread(self, family: str) -> None:
        """Refuse a key that no one has read, that changes the mathematics by its name, and that is
        not off.

        Raises:
            ModelLoadError: naming the key.
        """
        for key, value in self.values.items():
            if (
                key in self.read
                or key in _HARMLESS
                or not _MATHEMATICAL.search(key)
                or _is_off(key, value, self.values)
            ):
                continue
            raise ModelLoadError(
                f"{self.path}: {self.where} has {key} = {value!r}, which the {family} family does not support"
            )

    @property
    def eos(self) -> tuple[int, ...]:
        value = self.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        if not all(_is_id(one) for one in ids):
            raise self._refuse("eos_token_id", value, "a token id or a list of them")
        return tuple(ids)

    @property
    def mask(self) -> int | None:
        value = self.get("mask_token_id")
        if value is not None and not _is_id(value):
            raise self._refuse("mask_token_id", value, "a token id")
        return None if value is None else int(value)

    @property
    def rope(self) -> RawConfig:
        """`rope_parameters`, where transformers 5 keeps what older files have beside it."""
        return (
            self.section("rope_parameters")
            if self.values.get("rope_parameters") is not None
            else self
        )

    @property
    def rope_theta(self) -> float:
        """From `rope_theta`, or transformers 5's `rope_parameters`. Scaled variants are refused."""
        for name in ("rope_parameters", "rope_scaling"):
            if self.values.get(name) is None:
                continue
            section = self.section(name)
            kind = section.get("rope_type", section.get("type", "default"))
            if kind == "default":
                section.read |= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
                section.refuse_unread("default RoPE of this")
            else:
                raise ModelLoadError(
                    f"{self.path}: {self.where} asks for {kind} RoPE scaling, which is not supported"
                )
        return self.number("rope_theta", self.rope.number("rope_theta", 10_000.0))

    @property
    def rotary_share(self) -> float:
        """The share of a head's dimensions that positions turn; from `partial_rotary_factor`,
        wherever it stands.
        """
        share = self.number("partial_rotary_factor", self.rope.number("partial_rotary_factor", 1.0))
        if share > 1:
            raise self._refuse("partial_rotary_factor", share, "a number up to 1")
        return share


# Words in the names of keys that change what a forward or a step computes. A key is refused when
# its name has one of them, no family file reads it, and its value does not turn it off.
_MATHEMATICAL = re.compile(
    r"capacity|routing|router|group|expert|delete|split|insert|edit|softcap|multiplier|alibi|window|sliding|quant|fp8|fp4|int4"
    r"|scal|rope|rotary|mrope|sink|chunk|layer_types|linear_att|mamba|ssm|conv_|hybrid|lora|nextn|mtp|bias|norm|causal"
    r"|block_size|qkv|activation|residual|parallel_att|paradigm|shift"
)
# Keys with such a word that change nothing at inference, whatever their value.
_HARMLESS = frozenset(
    {
        "alibi_bias_max",
        "attention_layer_norm_with_affine",
        "block_group_size",
        "bias_for_layer_norm",
        "dlm_loss_weight",
        "initializer_range",
        "layer_norm_with_affine",
        "max_window_layers",
        "norm_after",
        "output_router_logits",
        "residual_dropout",
        "rope_full_precision",
        "router_aux_loss_coef",
        "router_dtype",
        "router_z_loss_coef",
        "router_jitter_noise",
        "use_rms_norm_fusion",
        "activation_checkpointing",
        "layer_norm_type",
    }
)


def _is_off(key: str, value: Any, values: Mapping[str, Any]) -> bool:
    """Return whether a key's value means that nothing is changed."""
    if value is None or value is False or value in (0, "", [], {}, "none"):
        return True
    if key == "sliding_window":
        return values.get("use_sliding_window") is False
    if key == "layer_types":
        return isinstance(value, list) and set(value) <= {"full_attention"}
    return key.endswith("multiplier") and value == 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def llama_like(raw: RawConfig, family: str, **own: Any) -> ModelConfig:
    """The facts of a config.json that names things as Llama's does; `own` is what the family adds
    or has otherwise.
    """
    heads, width = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    facts: dict[str, Any] = {
        "architecture": raw.architecture,
        "family": family,
        "width": width,
        "layers": raw.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": raw.integer("num_key_value_heads", heads),
        "head_dim": raw.integer("head_dim", width // heads),
        "vocab_size": raw.integer("vocab_size"),
        "context_length": raw.integer("max_position_embeddings"),
        "rope_theta": raw.rope_theta,
        "norm_eps": raw.number("rms_norm_eps", 1e-6),
        "tied": bool(raw.get("tie_word_embeddings", False)),
        "mask_token_id": raw.mask,
        "eos_token_ids": raw.eos,
        "generation": raw.generation,
    }
    if "mlp_width" not in own:
        facts["mlp_width"] = raw.integer("intermediate_size")
    return ModelConfig(**{**facts, **own})


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError."""
    if missing_ok and not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelLoadError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ModelLoadError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return data
