"""Attention of a forward's units: padded or of one shape through PyTorch's SDPA, or of any lengths
through a ragged kernel.

On CUDA in half precision sequences of different lengths share one call without padding
(FlashAttention's varlen form, Dao 2023, as `torch.nn.attention.varlen` has it). Whether the kernel
works on this device is tried once, when the model is loaded.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.engine.batch import Ragged, Unit

log = logging.getLogger(__name__)

TOLERANCE = 2e-2  # between two kernels in half precision, outputs of the order of 1


class Varlen(Protocol):
    """Attention of sequences that stand behind one another: q [rows, heads, head_dim], k and v
    [keys, kv_heads, head_dim].
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor: ...


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        ragged.row_ends,
        ragged.key_ends,
        ragged.rows,
        ragged.keys,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def segment_sdpa(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """The same, sequence by sequence: what other kernels are held against."""
    rows, keys = ragged.row_ends.tolist(), ragged.key_ends.tolist()
    out = torch.empty_like(q)
    for i in range(len(rows) - 1):
        here, seen = slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])
        one = F.scaled_dot_product_attention(
            q[here].transpose(0, 1)[None],
            k[seen].transpose(0, 1)[None],
            v[seen].transpose(0, 1)[None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[here] = one[0].transpose(0, 1)
    return out


def varlen_of(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> Varlen | None:
    """The ragged kernel when this device has one that agrees with SDPA, else None (and the log says
    why).
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return flash_varlen if agrees(flash_varlen, device, dtype, heads, kv_heads, head_dim) else None


def agrees(
    kernel: Varlen,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> bool:
    """Try a kernel on three sequences of different lengths."""
    rows, keys = (5, 1, 32), (7, 3, 64)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(of), n, head_dim, generator=draw).to(device, dtype)
        for of, n in ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    )
    ragged = Ragged.of(rows, keys, device)
    try:
        difference = (
            (kernel(q, k, v, ragged).float() - segment_sdpa(q, k, v, ragged).float())
            .abs()
            .max()
            .item()
        )
    except (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError) as exc:
        log.warning("no ragged attention on %s (%s); sequences are padded instead", device, exc)
        return False
    if not difference <= TOLERANCE:
        log.warning(
            "ragged attention on %s is off by %.3g; sequences are padded instead",
            device,
            difference,
        )
        return False
    return True


def attend(
    unit: Unit, q: Tensor, k: Tensor, v: Tensor, layer: int, varlen: Varlen | None
) -> Tensor:
    """Attention of one unit: q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], all
    packed; returns like q.
    """
    if unit.ragged is not None:
        assert varlen is not None
        return _ragged(unit, unit.ragged, q, k, v, layer, varlen)
    here = slice(unit.begin, unit.end)
    count, gqa = len(unit.passes), q.shape[1] != k.shape[1]
    padded = q[here] if unit.gather is None else q[unit.gather]
    queries = padded.view(count, unit.rows, q.shape[1], q.shape[2]).transpose(1, 2)
    if unit.cached:
        keys, values = _through_caches(unit, k[here], v[here], layer)
    elif unit.gather is None:
        keys = k[here].view(count, unit.rows, k.shape[1], k.shape[2]).transpose(1, 2)
        values = v[here].view(count, unit.rows, v.shape[1], v.shape[2]).transpose(1, 2)
    else:
        keys = k[unit.gather].view(count, unit.rows, k.shape[1], k.shape[2]).transpose(1, 2)
        values = v[unit.gather].view(count, unit.rows, v.shape[1], v.shape[2]).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=unit.mask, enable_gqa=gqa)
    out = out.transpose(1, 2).reshape(count * unit.rows, q.shape[1], q.shape[2])
    return out if unit.scatter is None else out[unit.scatter]


def _written(unit: Unit, k: Tensor, v: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Write the rows' keys and values into their caches; what each sequence sees, [kv_heads, keys,
    head_dim].
    """
    read: list[tuple[Tensor, Tensor]] = []
    at = 0
    for p in unit.passes:
        assert p.cache is not None
        n = len(p.ids)
        keys, values = p.cache.layer(layer)
        keys[:, p.first : p.first + n] = k[at : at + n].transpose(0, 1)
        values[:, p.first : p.first + n] = v[at : at + n].transpose(0, 1)
        at += n
        read.append((keys[:, : p.keys], values[:, : p.keys]))
    return read


def _through_caches(unit: Unit, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Write the rows' keys and values into their caches, and read what is visible: [sequences,
    kv_heads, keys, head_dim].
    """
    read = _written(unit, k, v, layer)
    if len(read) == 1:
        return read[0][0][None], read[0][1][None]
    if all(keys.shape[1] == unit.keys for keys, _ in read):
        return torch.stack([keys for keys, _ in read]), torch.stack([values for _, values in read])
    short = [unit.keys - keys.shape[1] for keys, _ in read]
    return (
        torch.stack([F.pad(keys, (0, 0, 0, s)) for (keys, _), s in zip(read, short, strict=True)]),
        torch.stack(
            [F.pad(values, (0, 0, 0, s)) for (_, values), s in zip(read, short, strict=True)]
        ),
    )


def _ragged(
    unit: Unit, ragged: Ragged, q: Tensor, k: Tensor, v: Tensor, layer: int, varlen: Varlen
) -> Tensor:
    here = slice(unit.begin, unit.end)
    if not unit.cached:
        return varlen(q[here], k[here], v[here], ragged)
    read = _written(unit, k[here], v[here], layer)
    keys, values = (torch.cat([part[i].transpose(0, 1) for part in read]) for i in (0, 1))
    return varlen(q[here], keys, values, ragged)
