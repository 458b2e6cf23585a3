"""Configuration of the engine, and the facts of a checkpoint. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError, ModelLoadError


@dataclass(frozen=True, slots=True)
class VDiffConfig:
    """What to load and how to run it. Values that are not built yet are refused here, by name.

    Raises:
        ConfigurationError: naming the field.
    """

    model: str  # folder or hub id
    tokenizer: str | None = None
    revision: str | None = None
    served_model_name: str | None = None
    dtype: str = "auto"  # float32 on CPU, bfloat16 on accelerators
    device: str = "auto"
    max_num_seqs: int = 8  # sequences per step
    max_model_len: int | None = None  # tokens, prompt and answer
    num_threads: int | None = None
    diffusion_steps: int | None = None  # default steps of an answer
    block_size: int | None = None  # default block_length
    quantization: str | None = None
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    enable_apd: bool = False

    def __post_init__(self) -> None:
        if self.tensor_parallel_size != 1:
            raise ConfigurationError("tensor_parallel_size other than 1 is not built yet", param="tensor_parallel_size")
        if self.quantization is not None:
            raise ConfigurationError("quantization is not built yet; leave it out", param="quantization")
        if self.trust_remote_code:
            raise ConfigurationError("no supported model needs remote code; leave it out", param="trust_remote_code")
        if self.enable_apd:
            raise ConfigurationError(
                "APD needs a verifier, which cannot be served yet; leave it out", param="enable_apd"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigurationError(f"dtype {self.dtype!r} is not auto, float32, bfloat16 or float16", param="dtype")
        for name in ("max_num_seqs", "max_model_len", "num_threads", "diffusion_steps", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1", param=name)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of a LLaDA-layout checkpoint, read from its config.json."""

    architecture: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab_size: int  # rows of the embedding
    context_length: int
    rope_theta: float
    norm_eps: float
    tied: bool
    mask_token_id: int | None
    eos_token_id: int | None
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Raises ModelLoadError naming the file or key."""
        path = Path(folder)
        raw = _read_json(path / "config.json")
        architectures = raw.get("architectures") or []
        if architectures[:1] != ["LLaDAModelLM"]:
            found = ", ".join(map(str, architectures)) or "none"
            raise ModelLoadError(f"{path}: architecture {found} is not supported; supported: LLaDAModelLM")
        for key, wanted in (
            ("alibi", False), ("input_emb_norm", False), ("scale_logits", False), ("include_bias", False),
            ("include_qkv_bias", False), ("attention_layer_norm", False), ("rope", True), ("layer_norm_type", "rms"),
            ("activation_type", "silu"), ("block_type", "llama"),
        ):  # fmt: skip
            if raw.get(key, wanted) != wanted:
                raise ModelLoadError(f"{path}: config.json has {key} = {raw[key]!r}; only {wanted!r} is supported")
        generation = path / "generation_config.json"
        try:
            heads = int(raw["n_heads"])
            return cls(
                architecture=architectures[0],
                width=int(raw["d_model"]),
                layers=int(raw["n_layers"]),
                heads=heads,
                kv_heads=int(raw.get("n_kv_heads") or heads),
                mlp_width=int(raw.get("mlp_hidden_size") or raw["d_model"] * raw["mlp_ratio"]),
                vocab_size=int(raw.get("embedding_size") or raw["vocab_size"]),
                context_length=int(raw["max_sequence_length"]),
                rope_theta=float(raw.get("rope_theta", 10_000.0)),
                norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
                tied=bool(raw.get("weight_tying", False)),
                mask_token_id=raw.get("mask_token_id"),
                eos_token_id=raw.get("eos_token_id"),
                generation=_read_json(generation) if generation.is_file() else {},
            )
        except KeyError as exc:
            raise ModelLoadError(f"{path}: config.json lacks {exc.args[0]}") from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelLoadError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ModelLoadError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} is not a JSON object")
    return data
