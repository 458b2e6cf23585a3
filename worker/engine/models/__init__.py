"""One transformer; a thin file per family maps config.json and tensor names onto it. `docs/add-a-model.md` says how."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ModelLoadError
from worker.engine.config import RawConfig
from worker.engine.models import diffusion_gemma, dream, llada, llada2_moe, llada_moe, sdar
from worker.engine.models.family import Family

FAMILIES: tuple[Family, ...] = (llada.FAMILY, dream.FAMILY, llada_moe.FAMILY, llada2_moe.FAMILY, sdar.FAMILY)
"""Those that our own transformer computes."""

KNOWN = {a: family for family in (*FAMILIES, diffusion_gemma.FAMILY) for a in family.architectures}
"""Every family that is built in, by the architecture that config.json names."""


def family_of(folder: Path) -> Family:
    """The family of a checkpoint. Raises ModelLoadError naming its architecture."""
    architecture = RawConfig(folder).architecture
    if architecture not in KNOWN:
        message = (
            f"{folder}: architecture {architecture} is not one of {', '.join(KNOWN)}; "
            "--trust-remote-code runs it through transformers, with the code that it brings"
        )
        raise ModelLoadError(message)
    return KNOWN[architecture]
