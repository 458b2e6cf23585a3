"""Random numbers as a function of (seed, step, position, token): a request's text never depends on
its neighbours.

A counter-based generator in the sense of Salmon et al. 2011 ("Parallel random numbers: as easy as
1, 2, 3"), with SplitMix64's finaliser as the mixing function. The same numbers on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.engine.precision import BELOW_ONE, wide
from worker.engine.request import mix64


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def uniform(seed: int, step: int, stream: int, positions: Tensor, columns: int) -> Tensor:
    """Numbers in (0, 1), [len(positions), columns], on the positions' device: float64; on MPS the
    same, rounded to float32.

    Args:
        seed: of the answer.
        step: step of the answer.
        stream: tells uses apart (0: token noise, 1: order of positions, 16 and up: steps of a
            schedule).
        positions: int64 [n], counted from the answer's start.
        columns: numbers per position.
    """
    device = positions.device
    where = device if wide(device) is torch.float64 else torch.device("cpu")
    key = _signed(mix64(mix64(seed) ^ mix64(mix64(step) ^ stream)))
    rows = _mix(positions.to(where) ^ key)[:, None]
    bits = _mix(rows + torch.arange(columns, device=where)[None, :])
    numbers = (_shift(bits, 11).double() + 0.5) * (1.0 / (1 << 53))
    return numbers if where == device else numbers.float().clamp_(max=BELOW_ONE).to(device)
