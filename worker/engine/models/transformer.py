"""The bidirectional transformer: pre-norm attention with rotary positions, SwiGLU, RMSNorm, no biases.

RMSNorm: Zhang and Sennrich 2019. SwiGLU: Shazeer 2020. Rotary positions ("rotate half", angles in float32): Su et al.
2021. Grouped-query attention: Ainslie et al. 2023. The forward stops before the head, so that the caller sends only the
rows it needs through `logits`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.engine.config import ModelConfig


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
    """x [batch, heads, length, head_dim]; cos and sin [length, head_dim] in float32."""
    half = x.shape[-1] // 2
    y = x.float()
    rotated = torch.cat((-y[..., half:], y[..., :half]), dim=-1)
    return (y * cos + rotated * sin).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.attn_norm = RMSNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.norm_eps)
        self.gate_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        h = self.attn_norm(x)
        q = self.q_proj(h).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            apply_rotary(q, cos, sin),
            apply_rotary(k, cos, sin),
            v,
            attn_mask=keys,
            enable_gqa=self.heads != self.kv_heads,
        )
        x = x + self.attn_out(attended.transpose(1, 2).reshape(batch, length, width))
        h = self.ff_norm(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return out


class Transformer(nn.Module):
    """Token ids to hidden states to logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._angles: tuple[Tensor, Tensor] | None = None

    def _rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._angles is None or self._angles[0].shape[0] < length or self._angles[0].device != device:
            grown = 1 << (length - 1).bit_length()
            half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
            frequency = 1.0 / self.config.rope_theta**half
            angles = torch.outer(torch.arange(grown, dtype=torch.float32, device=device), frequency)
            angles = torch.cat((angles, angles), dim=-1)  # [length, head_dim]
            self._angles = angles.cos(), angles.sin()
        cos, sin = self._angles
        return cos[:length], sin[:length]

    def hidden(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Hidden states before the last norm.

        Args:
            ids: [batch, length], right-padded.
            lengths: [batch] real lengths, or None when no row is padded.

        Returns:
            [batch, length, width]; what stands at padding is meaningless.
        """
        length = ids.shape[1]
        cos, sin = self._rotary(length, ids.device)
        keys = None
        if lengths is not None:
            keys = (torch.arange(length, device=ids.device)[None, :] < lengths[:, None])[:, None, None, :]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, keys)
        out: Tensor = x
        return out

    def logits(self, rows: Tensor) -> Tensor:
        """[rows, width] hidden states -> [rows, vocab] logits in float32."""
        out: Tensor = self.head(self.norm(rows))
        return out.float()
