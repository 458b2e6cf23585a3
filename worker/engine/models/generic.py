"""Models that only transformers knows: masked ones that map token ids to logits, and causal ones as verifiers.

They run through their own classes, without our caches: every step computes whole sequences. Code of a model's repository
is executed only with trust_remote_code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import ModelLoadError
from worker.engine.batch import Pass
from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, Source

_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions")


def config(path: Path) -> ModelConfig:
    raw = RawConfig(path)
    context = next((raw.integer(key) for key in _CONTEXT_KEYS if raw.get(key) is not None), None)
    if context is None:
        raise ModelLoadError(f"{path}: config.json says no context length ({', '.join(_CONTEXT_KEYS)})")
    return ModelConfig(
        architecture=raw.architecture, family="transformers", width=0, layers=0, heads=0, kv_heads=0, head_dim=0, mlp_width=0,
        vocab_size=raw.integer("vocab_size"), context_length=context, rope_theta=0.0, norm_eps=0.0, tied=False,
        mask_token_id=raw.get("mask_token_id"), eos_token_ids=raw.eos, generation=raw.generation,
    )  # fmt: skip


def _no_sources(facts: ModelConfig) -> Iterator[Source]:
    return iter(())


FAMILY = Family(name="transformers", architectures=(), config=config, sources=_no_sources)


class TransformersMasked:
    """A masked model of transformers; sequences of one length share a forward."""

    cache_bytes_per_token = 0

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def new_cache(self, capacity: int) -> Any:
        raise NotImplementedError("models of transformers run without our caches")

    def compute(self, passes: Sequence[Pass]) -> Iterator[Tensor]:
        """Logits of each pass's wanted rows, [wanted, vocab] float32."""
        groups: dict[int, list[int]] = {}
        for i, p in enumerate(passes):
            groups.setdefault(len(p.ids), []).append(i)
        out: list[Tensor | None] = [None] * len(passes)
        for members in groups.values():
            ids = torch.tensor([passes[i].ids for i in members], device=self.device)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            for row, i in enumerate(members):
                out[i] = logits[row, passes[i].wanted].float()
        for part in out:
            assert part is not None
            yield part


def load(folder: Path, facts: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> TransformersMasked:
    """Raises ModelLoadError with what transformers says."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        masked = type(settings) in MODEL_FOR_MASKED_LM_MAPPING
        kind = AutoModelForMaskedLM if masked else AutoModel
        model = kind.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as exc:
        raise ModelLoadError(f"{folder}: transformers cannot load it: {exc}") from exc
    adapter = TransformersMasked(model.to(device).eval())
    with torch.inference_mode():
        try:
            next(adapter.compute([Pass([0, 0], [0])]))
        except (AttributeError, TypeError, ValueError, RuntimeError) as exc:
            raise ModelLoadError(f"{folder}: it does not map token ids to logits: {exc}") from exc
    return adapter


class _HeldCache:
    """One sequence's cache of a transformers model."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.held = DynamicCache()

    def swap_out(self) -> None:
        """Move to host memory, so that another sequence has room; nothing is lost."""
        layers: list[Any] = self.held.layers
        for layer in layers:
            layer.offload()

    def swap_in(self) -> None:
        layers: list[Any] = self.held.layers
        for layer in layers:
            layer.prefetch()


class TransformersCausal:
    """A causal model of transformers as verifier; its caches are not ragged, so sequences take turns."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # transformers 5.24 renamed the argument, earlier ones know only the old name.
        self.cache_bytes_per_token = _cache_bytes(model)
        self._argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def new_cache(self, capacity: int) -> _HeldCache:
        return _HeldCache()

    def compute(self, passes: Sequence[Pass]) -> Iterator[Tensor]:
        """Logits of each pass's wanted rows, [wanted, vocab] float32."""
        for p in passes:
            assert isinstance(p.cache, _HeldCache)
            cache = p.cache.held
            if cache.get_seq_length() > p.first:
                cache.crop(p.first)
            ids = torch.tensor([p.ids], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=True, **{self._argument: cache}).logits
            yield logits[0, p.wanted].float()


def _cache_bytes(model: Any) -> int:
    """Bytes of K/V of one position, as far as its config tells; 0 when it names things in a way of its own."""
    c = model.config
    layers, heads = getattr(c, "num_hidden_layers", None), getattr(c, "num_attention_heads", None)
    width = getattr(c, "hidden_size", None)
    if not (layers and heads and width):
        return 0
    kv_heads = getattr(c, "num_key_value_heads", None) or heads
    head_dim = getattr(c, "head_dim", None) or width // heads
    return int(2 * layers * kv_heads * head_dim * model.dtype.itemsize)


def load_causal(
    folder: Path, *, dtype: torch.dtype, device: torch.device, trust: bool
) -> tuple[TransformersCausal, int]:
    """A causal model and its vocabulary's size. Raises ModelLoadError."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as exc:
        raise ModelLoadError(f"{folder}: transformers cannot load it as a causal model: {exc}") from exc
    return TransformersCausal(model.to(device).eval()), int(model.get_input_embeddings().num_embeddings)
