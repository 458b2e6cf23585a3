"""The transformer of all native families: pre-norm attention with rotary positions, SwiGLU or
experts, RMSNorm.

RMSNorm: Zhang and Sennrich 2019. SwiGLU: Shazeer 2020. Rotary positions ("rotate half", angles in
float32): Su et al. 2021. Grouped-query attention: Ainslie et al. 2023. What differs between
families stands in `ModelConfig`. Works on packed rows (`worker.engine.batch`), and sends only the
rows that are asked for through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from worker.engine.batch import Layout, Pass, arrange
from worker.engine.cache import KVCache
from worker.engine.config import ModelConfig
from worker.engine.models.attention import Varlen, attend
from worker.engine.models.graphs import Graphs
from worker.engine.models.moe import MLP, MoE

HEAD_ROWS = 256  # rows of one chunk through the head: with 152,000 tokens 156 MB of logits


class LateLogits:
    """The logits of a pass with very many rows, [rows, vocab] float32: what is sliced goes through
    the head then.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
        self._head, self._hidden = head, hidden

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._head(self._hidden[rows])


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, head_dim]; cos and sin [rows, 1, rotary_dim] in float32. Dimensions beyond
    rotary_dim stay.
    """
    width = cos.shape[-1]
    y = x[..., :width].float()
    half = width // 2
    rotated = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
    y = (y * cos + rotated * sin).to(x.dtype)
    return y if width == x.shape[-1] else torch.cat((y, x[..., width:]), dim=-1)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = nn.Linear(
            config.width,
            (config.heads + 2 * config.kv_heads) * config.head_dim,
            bias=config.qkv_bias,
        )
        self.attn_out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.ff_norm = RMSNorm(config.width, config.norm_eps)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        sparse = config.moe is not None and index not in config.moe.dense_layers
        self.mlp: nn.Module = (
            MoE(config.width, config.moe)
            if sparse and config.moe
            else MLP(config.width, config.mlp_width)
        )

    @property
    def on_device(self) -> bool:
        """Return whether no part of it waits for the host."""
        return not isinstance(self.mlp, MoE) or self.mlp.on_device

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of packed rows, [rows, heads or kv_heads, head_dim]."""
        heads = self.qkv(self.attn_norm(x)).view(
            x.shape[0], self.heads + 2 * self.kv_heads, self.head_dim
        )
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rows [rows, width] with what attention and the MLP add."""
        x = x + self.attn_out(attended.reshape(x.shape[0], self.heads * self.head_dim))
        out: Tensor = x + self.mlp(self.ff_norm(x))
        return out

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, varlen: Varlen | None = None
    ) -> Tensor:
        q, k, v = self.before(x, cos, sin)
        parts = [attend(unit, q, k, v, self.index, varlen) for unit in layout.units]
        return self.after(x, parts[0] if len(parts) == 1 else torch.cat(parts))


class Transformer(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._angles: tuple[Tensor, Tensor] | None = None
        self.pads: bool | None = None  # None: pad similar sequences on accelerators, not on CPU
        self.varlen: Varlen | None = None  # attention without padding, where the device has it
        self.graphs: Graphs | None = None  # of everything else, where the device has them

    @property
    def blocks(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def fuse(self, backend: str = "inductor") -> None:
        """Have torch.compile fuse what works row by row: all of a layer but attention, whose shapes
        change with every step.

        The number of rows is left open, so that one compilation serves every batch; layers of one
        kind share it.
        """
        for experts in (module for module in self.modules() if isinstance(module, MoE)):
            experts.leave_uncompiled()
        for layer in self.blocks:
            layer.before = torch.compile(layer.before, dynamic=True, backend=backend)  # type: ignore[method-assign]
            layer.after = torch.compile(layer.after, dynamic=True, backend=backend)  # type: ignore[method-assign]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def cache_bytes_per_token(self) -> int:
        c = self.config
        return 2 * c.layers * c.kv_heads * c.head_dim * self.dtype.itemsize

    def new_cache(self, capacity: int) -> KVCache:
        """Room for the keys and values of `capacity` positions of one sequence."""
        c = self.config
        return KVCache(
            c.layers, c.kv_heads, capacity, c.head_dim, dtype=self.dtype, device=self.device
        )

    def _rotary(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        if (
            self._angles is None
            or self._angles[0].shape[0] < longest
            or self._angles[0].device != positions.device
        ):
            grown, width = (
                1 << (longest - 1).bit_length(),
                self.config.rotary_dim or self.config.head_dim,
            )
            half = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
            frequency = 1.0 / self.config.rope_theta**half
            angles = torch.outer(
                torch.arange(grown, dtype=torch.float32, device=positions.device), frequency
            )
            angles = torch.cat((angles, angles), dim=-1)  # [positions, rotary_dim]
            self._angles = angles.cos(), angles.sin()
        cos, sin = self._angles
        return cos[positions][:, None], sin[positions][:, None]

    def hidden(self, layout: Layout, longest: int) -> Tensor:
        """Hidden states [rows, width] before the last norm. `longest`: one more than the highest
        position.
        """
        cos, sin = self._rotary(layout.positions, longest)
        if self.graphs is not None and len(layout.ids) <= self.graphs.largest:
            return self.graphs.hidden(layout, cos, sin)
        x: Tensor = self.embedding(layout.ids)
        for layer in self.layers:
            x = layer(x, cos, sin, layout, self.varlen)
        return x

    def logits(self, rows: Tensor) -> Tensor:
        """[rows, width] hidden states -> [rows, vocab] logits in float32."""
        out: Tensor = self.head(self.norm(rows))
        return out.float()

    def compute(self, passes: Sequence[Pass]) -> Iterator[Tensor | LateLogits]:
        """One forward of all passes; then, pass by pass, the logits of its wanted rows, [wanted,
        vocab] float32.

        The head runs in chunks as the iterator is read, so that the logits of a whole batch never
        exist at once; those of a pass with over HEAD_ROWS rows only as they are sliced.
        """
        pads = self.device.type != "cpu" if self.pads is None else self.pads
        layout = arrange(passes, self.device, pad=pads, varlen=self.varlen is not None)
        hidden = self.hidden(layout, max(p.first + len(p.ids) for p in passes))[layout.take]
        for counts in chunks(layout.counts, HEAD_ROWS):
            rows = sum(counts)
            if rows > HEAD_ROWS:  # a single pass
                yield LateLogits(self.logits, hidden[:rows])
            else:
                yield from torch.split(self.logits(hidden[:rows]), counts)
            hidden = hidden[rows:]


def chunks(counts: Sequence[int], largest: int) -> Iterator[list[int]]:
    """Cut a list of row counts into runs of at most `largest` rows, or of one pass."""
    run: list[int] = []
    for count in counts:
        if run and sum(run) + count > largest:
            yield run
            run = []
        run.append(count)
    if run:
        yield run
