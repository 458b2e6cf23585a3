"""The encoder's keys and values of one DiffusionGemma sequence, and the attention that reads them.

The decoder's canvas sees everything that is cached and itself, so the sequences of a batch differ
in nothing but the length of what they have cached. Attention is therefore done sequence by sequence
on exactly its own keys: nothing is padded, nothing is masked, and a sequence's attention is the
same call whoever else is in the batch. All other layers work on the whole batch.

Sliding layers keep the last `window - 1` positions, as transformers' cache does, and the canvas
sees all of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The shape of one layer's cache for a position. `window`: how far a sliding layer looks; None:
    over everything.
    """

    kv_heads: int
    head_dim: int
    window: int | None

    def kept(self, length: int) -> int:
        """Positions that are cached after `length` of them."""
        return length if self.window is None else min(length, self.window - 1)


class PrefixCache:
    """Keys and values of positions 0..length-1, with room behind them for those of the canvas.

    Args:
        capacity: positions of the whole sequence, its last canvas included.
        canvas: length of a canvas.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        capacity: int,
        canvas: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes, self.capacity, self.length = shapes, capacity, 0
        self._home = device
        self._data = [
            torch.empty(
                2,
                s.kv_heads,
                min(capacity, s.kept(capacity) + canvas),
                s.head_dim,
                dtype=dtype,
                device=device,
            )
            for s in shapes
        ]
        self._tails: dict[int, Tensor] = {}  # of sliding layers, while the encoder runs

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the K/V that new positions attend to: the cached ones and their own. They count as
        cached only after `advance`, so that a forward that fails half-way can be repeated.

        Args:
            k, v: [kv_heads, new, head_dim] of the positions after the cached ones.
        """
        shape, data = self.shapes[layer], self._data[layer]
        kept, new = shape.kept(self.length), k.shape[1]
        if shape.window is None:
            return self.with_canvas(layer, k, v)
        keys, values = (
            torch.cat((data[0, :, :kept], k), dim=1),
            torch.cat((data[1, :, :kept], v), dim=1),
        )
        tail = shape.kept(self.length + new)
        self._tails[layer] = (
            torch.stack((keys[:, -tail:], values[:, -tail:])) if tail else data[:, :, :0]
        )
        return keys, values

    def advance(self, new: int) -> None:
        """Take the `new` positions that every layer has seen as cached."""
        for layer, tail in self._tails.items():
            self._data[layer][:, :, : tail.shape[2]] = tail
        self._tails = {}
        self.length += new

    def with_canvas(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The cached keys and values, and behind them those given, [kv_heads, canvas, head_dim];
        written in place of the last canvas's, so that nothing is copied.
        """
        data = self._data[layer]
        kept = self.shapes[layer].kept(self.length)
        end = kept + k.shape[1]
        data[0, :, kept:end], data[1, :, kept:end] = k, v
        return data[0, :, :end], data[1, :, :end]

    def swap_out(self) -> None:
        """Move to host memory, so that another sequence has room; nothing is lost."""
        self._data = [data.cpu() for data in self._data]

    def swap_in(self) -> None:
        self._data = [data.to(self._home) for data in self._data]


class Encoding:
    """Stands in for transformers' cache while the encoder runs: `attend` keeps what is to be kept."""

    def update(self, k: Tensor, v: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        return k, v


@dataclass(frozen=True, slots=True)
class _NoKeys:
    keys: Tensor
    values: Tensor


class Decoding:
    """Stands in for transformers' cache while the decoder runs, and is empty: `attend` reads the
    sequences' own caches.
    """

    is_compileable = False

    def __init__(
        self, shapes: Sequence[LayerShape], batch: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        empty = [
            torch.empty(batch, s.kv_heads, 0, s.head_dim, dtype=dtype, device=device)
            for s in shapes
        ]
        self.layers = [_NoKeys(e, e) for e in empty]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    caches: Sequence[PrefixCache],
    encodes: bool,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, over each sequence's own cache.

    Args:
        query: [sequences, heads, rows, head_dim]; key and value have kv_heads.
        caches: one for each sequence.
        encodes: whether the rows are new positions of the sequences, causal among themselves; else
            they are canvases.
    """
    layer, out = module.layer_idx, []
    for i, cache in enumerate(caches):
        keys, values = (cache.extended if encodes else cache.with_canvas)(layer, key[i], value[i])
        mask = (
            _causal(query.shape[2], keys.shape[1], cache.shapes[layer].window, query.device)
            if encodes
            else None
        )
        grouped = query.shape[1] != keys.shape[0]
        out.append(
            F.scaled_dot_product_attention(
                query[i : i + 1],
                keys[None],
                values[None],
                attn_mask=mask,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(out).transpose(1, 2), None


def _causal(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [rows, keys]: the rows are the last of the keys' positions; each sees itself and what is
    before, in its window.
    """
    position = torch.arange(keys - rows, keys, device=device)[:, None]
    back = position - torch.arange(keys, device=device)[None, :]
    seen = back >= 0
    return seen if window is None else seen & (back < window)
