"""DiffusionGemma through its native transformers class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from worker.engine.config import ModelConfig
from worker.engine.models.family import Family, Source


def config(path: Path) -> ModelConfig:
    raise NotImplementedError


def _no_sources(facts: ModelConfig) -> Iterator[Source]:
    return iter(())


FAMILY = Family(
    name="diffusion_gemma", architectures=("DiffusionGemmaForBlockDiffusion",), config=config, sources=_no_sources
)


def load(folder: Path, facts: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Any:
    raise NotImplementedError
