"""Models that only transformers knows: masked ones that map token ids to logits, and causal ones as
verifiers.

They run through their own classes, without our caches: every step computes whole sequences. Code of
a model's repository is executed only with trust_remote_code.
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


def config(raw: RawConfig) -> ModelConfig:
    context = next((raw.integer(key) for key in _CONTEXT_KEYS if raw.get(key) is not None), None)
    if context is None:
        raise ModelLoadError(
            f"{raw.path}: config.json says no context length ({', '.join(_CONTEXT_KEYS)})"
        )
    return ModelConfig(
        architecture=raw.architecture,
        family="transformers",
        width=0,
        layers=0,
        heads=0,
        kv_heads=0,
        head_dim=0,
        mlp_width=0,
        vocab_size=raw.integer("vocab_size"),
        context_length=context,
        rope_theta=0.0,
        norm_eps=0.0,
        tied=False,
        mask_token_id=raw.mask,
        eos_token_ids=raw.eos,
        generation=raw.generation,
    )


def _no_sources(facts: ModelConfig) -> Iterator[Source]:
    return iter(())


FAMILY = Family(
    name="transformers", architectures=(), config=config, sources=_no_sources, strict=False
)


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


_AUTO_CLASSES = (
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModel",
)  # heads before bare layers


def _class_of(folder: Path, architecture: str) -> Any:
    """The class of transformers that makes the model, in the order of what is likeliest to give
    logits.

    A repository with code of its own says in `auto_map` which of its classes stands for which auto
    class; the one that `architectures` names is the whole model. Without `auto_map` transformers
    knows the architecture itself.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    theirs: dict[str, str] = getattr(settings, "auto_map", None) or {}
    named = [
        name
        for name in _AUTO_CLASSES
        if name in theirs and theirs[name].rpartition(".")[2] == architecture
    ]
    kinds = [*named, *(name for name in _AUTO_CLASSES if name in theirs)]
    known = type(settings)
    if known in MODEL_FOR_MASKED_LM_MAPPING:
        kinds.append("AutoModelForMaskedLM")
    if known in MODEL_FOR_CAUSAL_LM_MAPPING and architecture.endswith("ForCausalLM"):
        kinds.append("AutoModelForCausalLM")
    return getattr(transformers, [*kinds, "AutoModel"][0])


def load(
    folder: Path, facts: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> TransformersMasked:
    """Raises ModelLoadError with what transformers says."""
    try:
        kind = _class_of(folder, facts.architecture)
        model = kind.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as exc:
        said = str(exc).partition("\nModel type should be one of")[
            0
        ]  # without the list of every model there is
        raise ModelLoadError(f"{folder}: transformers cannot load it: {said}") from exc
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
    """A causal model of transformers as verifier; its caches are not ragged, so sequences take
    turns.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # transformers 5.24 renamed the argument, earlier ones know only the old name.
        self.cache_bytes_per_token = _cache_bytes(model)
        self._argument = (
            "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        )

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
    """Bytes of K/V of one position, as far as its config tells; 0 when it names things in a way of
    its own.
    """
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
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust, dtype=dtype
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as exc:
        raise ModelLoadError(
            f"{folder}: transformers cannot load it as a causal model: {exc}"
        ) from exc
    return TransformersCausal(model.to(device).eval()), int(
        model.get_input_embeddings().num_embeddings
    )
