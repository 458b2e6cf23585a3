"""The type for sums beyond float32: float64, except on MPS, which has none."""

from __future__ import annotations

import torch

BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1; a uniform number must not round to 1


def wide(device: torch.device) -> torch.dtype:
    """The widest floating type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
