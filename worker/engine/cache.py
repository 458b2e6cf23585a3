"""Keys and values of one sequence, one tensor for all layers, sized when the sequence starts.

Which positions in it are meaningful is the planner's business (`worker.engine.passes`): a pass
always writes the keys and values of its own rows and reads a prefix of the positions, so attention
never copies a single sequence's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K/V of positions 0..capacity-1."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._home = device
        # Zeros, not empty: a masked-out position must not turn a sum into NaN.
        self.data = torch.zeros(layers, 2, kv_heads, capacity, head_dim, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.data.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [kv_heads, capacity, head_dim] each; writing into them writes
        the cache.
        """
        return self.data[index, 0], self.data[index, 1]

    def swap_out(self) -> None:
        """Move to host memory, so that another sequence has room; nothing is lost."""
        self.data = self.data.cpu()

    def swap_in(self) -> None:
        self.data = self.data.to(self._home)
