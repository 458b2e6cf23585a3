"""The K/V capacity of the device, in positions."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from worker.engine import passes
from worker.engine.config import VDiffConfig
from worker.engine.request import Answer
from worker.engine.verifier import Verifier

HOST_SHARE = 0.5  # of the memory that is free on a CPU-only machine
ACTIVATIONS_SHARE = 0.1  # of a GPU's memory, kept for activations and logits
UNBOUNDED = 1 << 62


class Need:
    """The part of the capacity that an answer takes, in positions of the model's K/V.

    APD's verifier has K/V of its own, which counts by its size in bytes. A model without any (one
    of transformers) has no capacity to share, and the verifier's is not counted either.
    """

    def __init__(self, model: Any, verifier: Verifier | None) -> None:
        own = int(model.cache_bytes_per_token)
        self._verifier = (
            verifier.cache_bytes_per_token / own if verifier is not None and own else 0.0
        )

    def __call__(self, answer: Answer) -> int:
        positions = passes.capacity(answer) * passes.twins(answer)
        if passes.is_verified(answer):
            positions += math.ceil((len(answer.prompt) + len(answer.canvas)) * self._verifier)
        return positions


def cache_capacity(config: VDiffConfig, model: Any) -> int:
    """K/V positions of all sequences together; what `cache_tokens` says, else what fits, at least
    one.
    """
    if config.cache_tokens is not None:
        return config.cache_tokens
    per_token = int(model.cache_bytes_per_token)
    if per_token == 0:
        return UNBOUNDED
    device = model.device
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        room = total * (
            config.gpu_memory_utilization - ACTIVATIONS_SHARE
        ) - torch.cuda.memory_allocated(device)
    else:
        room = HOST_SHARE * _free_host_memory()
    return max(int(room) // per_token, 1)


def _free_host_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30  # not told (macOS): a careful guess
