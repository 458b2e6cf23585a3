"""How many positions of K/V the device has room for."""

from __future__ import annotations

import os
from typing import Any

import torch

from worker.engine.config import VDiffConfig

HOST_SHARE = 0.5  # of the memory that is free on a CPU-only machine
ACTIVATIONS_SHARE = 0.1  # of a GPU's memory, kept for activations and logits
UNBOUNDED = 1 << 62


def cache_capacity(config: VDiffConfig, model: Any) -> int:
    """K/V positions of all sequences together; what `cache_tokens` says, else what fits, at least one."""
    if config.cache_tokens is not None:
        return config.cache_tokens
    per_token = int(model.cache_bytes_per_token)
    if per_token == 0:
        return UNBOUNDED
    device = model.device
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        room = total * (config.gpu_memory_utilization - ACTIVATIONS_SHARE) - torch.cuda.memory_allocated(device)
    else:
        room = HOST_SHARE * _free_host_memory()
    return max(int(room) // per_token, 1)


def _free_host_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30  # not told (macOS): a careful guess
