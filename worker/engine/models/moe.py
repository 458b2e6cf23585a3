"""Mixture of experts: softmax or sigmoid routers, grouped choice, a shared expert.

Softmax router without renormalisation: OLMoE (Muennighoff et al. 2024). Sigmoid scores, a bias for
the selection only and the choice inside the best groups: DeepSeek-V3 (2024), as LLaDA2 has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.engine.config import MoEConfig


class MLP(nn.Module):
    """SwiGLU with gate and up in one matrix."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class MoE(nn.Module):
    """x [rows, width] -> [rows, width]."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.grouped: bool | None = (
            None  # None: grouped products on CUDA in bfloat16, else expert by expert
        )
        self.router = nn.Linear(width, config.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.width, width))
        self.down = nn.Parameter(torch.empty(config.experts, width, config.width))
        if config.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(config.experts))
        if config.shared_width:
            self.shared = MLP(width, config.shared_width)

    @property
    def on_device(self) -> bool:
        """Return whether the host never waits to learn which experts were chosen."""
        weights = self.gate_up
        return (
            self.grouped
            if self.grouped is not None
            else weights.is_cuda and weights.dtype == torch.bfloat16
        )

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, [rows, top_k] each; the router works in float32."""
        c = self.config
        logits = F.linear(x.float(), self.router.weight.float())
        scores = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(-1)
        ranked = scores + self.selection_bias.float() if c.selection_bias else scores
        if c.groups > 1:
            grouped = ranked.view(-1, c.groups, c.experts // c.groups)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(c.top_groups, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0]).scatter_(-1, best, 1.0).bool()
            ranked = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        chosen = ranked.topk(c.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if c.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * c.scale

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.choose(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        # Not bincount: it waits for the device to learn how long its result is.
        counts = flat.new_zeros(self.config.experts).scatter_add_(0, flat, torch.ones_like(flat))
        rows = x[
            order // self.config.top_k
        ]  # each row once for each of its experts, expert by expert
        done = self._grouped(rows, counts) if self.on_device else self._one_by_one(rows, counts)
        # Back in the rows' order and summed over the experts, not added by index: on a GPU that has
        # no fixed order.
        back = torch.empty_like(done).index_copy_(0, order, done).view(*chosen.shape, -1)
        out = (back.float() * weights[..., None]).sum(1).to(x.dtype)
        return out + self.shared(x) if self.config.shared_width else out

    def leave_uncompiled(self) -> None:
        """Keep torch.compile out of the loop over experts, whose length depends on the rows.

        Not a decorator: that would import torch's compiler, two seconds, in every process that
        never compiles.
        """
        self._one_by_one = torch.compiler.disable(self._one_by_one)  # type: ignore[method-assign, no-untyped-call]

    def _one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        """An expert after the other, those that nobody chose left out; on an accelerator this waits
        for the counts.
        """
        done = torch.empty_like(rows)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            if not count:
                continue
            own = slice(begin, begin + count)
            begin += count
            gate, up = F.linear(rows[own], self.gate_up[expert]).chunk(2, dim=-1)
            done[own] = F.linear(F.silu(gate) * up, self.down[expert])
        return done

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """All experts in two grouped products; the host never learns who was chosen."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=ends)
