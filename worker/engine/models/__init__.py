"""One transformer; a thin file per family maps config.json and tensor names onto it. `docs/add-a-model.md` says how."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ModelLoadError
from worker.engine.config import RawConfig
from worker.engine.models import dream, llada, llada2_moe, llada_moe, sdar
from worker.engine.models.family import Family

FAMILIES: tuple[Family, ...] = (llada.FAMILY, dream.FAMILY, llada_moe.FAMILY, llada2_moe.FAMILY, sdar.FAMILY)
_BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}


def is_native(architecture: str) -> bool:
    return architecture in _BY_ARCHITECTURE


def family_of(folder: Path) -> Family:
    """The family of a checkpoint. Raises ModelLoadError naming its architecture."""
    architecture = RawConfig(folder).architecture
    if architecture not in _BY_ARCHITECTURE:
        supported = ", ".join(_BY_ARCHITECTURE)
        raise ModelLoadError(f"{folder}: architecture {architecture} is not supported; supported: {supported}")
    return _BY_ARCHITECTURE[architecture]
