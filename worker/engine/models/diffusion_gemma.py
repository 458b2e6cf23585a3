"""DiffusionGemma through its native transformers class: a causal encoder that caches, a decoder
that denoises canvases.

The class computes; the loop around it is `worker.engine.renoise`. Text only: the vision tower is
neither loaded nor kept. transformers is imported when a checkpoint is loaded, not before: older
ones lack this class, and all other families run without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.algorithms import UNIFORM
from shared.errors import ModelLoadError
from worker.engine.config import ModelConfig, RawConfig
from worker.engine.models.family import Family, Source
from worker.engine.models.prefix_cache import Decoding, Encoding, LayerShape, PrefixCache, attend
from worker.engine.weights import copy_tensors

_ATTENTION = "vdiff_prefix"  # the name under which transformers knows our attention
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_NO_MASKS = {
    "full_attention": None,
    "sliding_attention": None,
}  # `attend` masks what is to be masked


def config(raw: RawConfig) -> ModelConfig:
    raw.only(tie_word_embeddings=True, quantization_config=None)
    text = raw.section("text_config")
    text.only(use_bidirectional_attention="vision", tie_word_embeddings=True)
    return ModelConfig(
        architecture=raw.architecture,
        family="diffusion_gemma",
        width=text.integer("hidden_size"),
        layers=text.integer("num_hidden_layers"),
        heads=text.integer("num_attention_heads"),
        kv_heads=text.integer("num_key_value_heads"),
        head_dim=text.integer("head_dim"),
        mlp_width=text.integer("intermediate_size"),
        vocab_size=text.integer("vocab_size"),
        context_length=text.integer("max_position_embeddings"),
        rope_theta=0.0,  # differs between kinds of layers; transformers reads it
        norm_eps=text.number("rms_norm_eps", 1e-6),
        tied=True,
        regime=UNIFORM,
        block_length=raw.integer("canvas_length", 256),
        eos_token_ids=raw.eos or text.eos,
        generation=raw.generation,
    )


def _no_sources(facts: ModelConfig) -> Iterator[Source]:
    return iter(())


FAMILY = Family(
    name="diffusion_gemma",
    architectures=("DiffusionGemmaForBlockDiffusion",),
    config=config,
    sources=_no_sources,
)


class DiffusionGemma:
    """The class behind what the decoding loop asks of it: caches, encoder, decoder, head.

    `together`: whether sequences share calls. A matrix product of more rows differs in the last
    bits, above all in experts that get only a few, and a run of hundreds of draws makes other texts
    of that: with random weights of 6 layers, 12 of 12 requests of 128 tokens changed. So on CPU
    each sequence gets a call of its own, of the shapes that it has alone, and its text is the same
    whoever is beside it (the price: 1.9 times the time, 8 sequences on one thread). On
    accelerators, where small calls waste most of the device, they share.

    Args:
        model: DiffusionGemmaForBlockDiffusion, loaded.
    """

    def __init__(self, model: Any, facts: ModelConfig) -> None:
        self.model, self.facts = model, facts
        self._encoder, self._decoder = model.model.encoder.language_model, model.model.decoder
        self._embedding = self._decoder.embed_tokens
        text = model.config.text_config
        self._softcap = float(text.final_logit_softcapping)
        self.shapes = [_shape(text, layer) for layer in range(text.num_hidden_layers)]
        self.together = self.device.type != "cpu"
        self._signal: Tensor | None = None
        self._decoder.self_conditioning.register_forward_pre_hook(self._with_signal)

    @property
    def device(self) -> torch.device:
        device: torch.device = self._embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._embedding.weight.dtype
        return dtype

    @property
    def cache_bytes_per_token(self) -> int:
        """Return the bytes of all layers. Sliding layers stop growing at their window, so this is
        an upper bound.
        """
        return sum(2 * s.kv_heads * s.head_dim for s in self.shapes) * self.dtype.itemsize

    def new_cache(self, capacity: int) -> PrefixCache:
        """Room for a sequence of `capacity` positions, its canvases included."""
        assert self.facts.block_length is not None
        return PrefixCache(
            self.shapes, capacity, self.facts.block_length, dtype=self.dtype, device=self.device
        )

    def encode(self, caches: Sequence[PrefixCache], ids: Sequence[Sequence[int]]) -> None:
        """Cache the tokens that follow in each sequence, equally many in all."""
        tokens = torch.tensor(ids, device=self.device)
        for some in self._calls(len(caches)):
            mine = caches[some]
            self._encoder(
                input_ids=tokens[some],
                position_ids=self._positions(mine, tokens.shape[1]),
                attention_mask=_NO_MASKS,
                cache=Encoding(),
                caches=mine,
                encodes=True,
            )
            for cache in mine:
                cache.advance(tokens.shape[1])

    def decode(
        self, caches: Sequence[PrefixCache], canvases: Tensor, signal: Tensor | None
    ) -> Tensor:
        """Hidden states of canvases that follow what is cached, [sequences, canvas, width].

        Args:
            canvases: int64 [sequences, canvas].
            signal: what the step before made of the canvas (`embed`), [sequences, canvas, width];
                zeros in its first. None: in all of them.
        """
        out = []
        for some in self._calls(len(caches)):
            mine = caches[some]
            self._signal = None if signal is None else signal[some]
            made = self._decoder(
                decoder_input_ids=canvases[some],
                decoder_position_ids=self._positions(mine, canvases.shape[1]),
                decoder_attention_mask=_NO_MASKS,
                cache=Decoding(self.shapes, len(mine), dtype=self.dtype, device=self.device),
                caches=mine,
                encodes=False,
            )
            self._signal = None
            out.append(made.last_hidden_state)
        return torch.cat(out)

    def _calls(self, sequences: int) -> list[slice]:
        return (
            [slice(0, sequences)] if self.together else [slice(i, i + 1) for i in range(sequences)]
        )

    def logits(self, rows: Tensor) -> Tensor:
        """[rows, width] hidden states -> [rows, vocab] logits in float32."""
        raw: Tensor = self.model.lm_head(rows).float()
        return raw.div_(self._softcap).tanh_().mul_(self._softcap)

    def embed(self, probabilities: Tensor) -> Tensor:
        """The mean embedding under [rows, vocab] probabilities, [rows, width]: the next step's
        signal.
        """
        mean = probabilities.to(self.dtype) @ self._embedding.weight
        signal: Tensor = mean * self._embedding.embed_scale.to(self.dtype)
        return signal

    def _positions(self, caches: Sequence[PrefixCache], rows: int) -> Tensor:
        first = torch.tensor([cache.length for cache in caches], device=self.device)
        return first[:, None] + torch.arange(rows, device=self.device)[None, :]

    def _with_signal(
        self, module: nn.Module, given: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The decoder would make the signal from logits of the whole vocabulary, kept from step to
        step for every sequence:
        with 262,144 tokens and canvases of 256 that is 268 MB each. We keep what it makes of them.
        """
        return given if self._signal is None else (given[0], self._signal)


def _shape(text: Any, layer: int) -> LayerShape:
    own = text.per_layer_config[layer]
    sliding = text.layer_types[layer] == "sliding_attention"
    return LayerShape(
        own.num_key_value_heads, own.head_dim, text.sliding_window if sliding else None
    )


def load(
    folder: Path, facts: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> DiffusionGemma:
    """Weights go from the files to the device tensor by tensor.

    Raises:
        ModelLoadError: a transformers without this class; a config that it refuses; naming the
            tensor that is missing, misshapen or unknown, or the truncated file.
    """
    try:
        from transformers import (
            AttentionInterface,
            DiffusionGemmaConfig,
            DiffusionGemmaForBlockDiffusion,
        )
    except ImportError as exc:
        raise ModelLoadError(
            f"{folder}: DiffusionGemma needs transformers 5.23 or newer: {exc}"
        ) from exc
    AttentionInterface.register(_ATTENTION, attend)
    try:
        settings = DiffusionGemmaConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = DiffusionGemmaForBlockDiffusion(settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as exc:
        raise ModelLoadError(f"{folder}: transformers refuses config.json: {exc}") from exc
    # On the meta device the vision tower has cost nothing so far, and without it none of its
    # weights is read.
    del model.model.encoder.vision_tower, model.model.encoder.embed_vision
    model.requires_grad_(False).eval()
    model.set_attn_implementation({"text_config": _ATTENTION})
    _make_constants(model, device)
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    copy_tensors(
        model,
        folder,
        wanted,
        dtype=dtype,
        device=device,
        skip=lambda name: name in tied or name.startswith(_VISION),
    )
    model.tie_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelLoadError(f"{folder}: nothing fills tensor {name}")
    return DiffusionGemma(model, facts)


def _make_constants(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds (frequencies, the embedding's scale), computed as
    transformers computes them.
    """
    for module in model.modules():
        constants = module._non_persistent_buffers_set
        for name in constants:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if constants:
            model._init_weights(module)
