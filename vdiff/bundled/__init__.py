"""The models that ship with vdiff, and the scorer of their evaluation set.

`vdiff-tiny` answers six kinds of questions with checkable answers; `vdiff-tiny-ar` is a small autoregressive model with
the same tokenizer, for Adaptive Parallel Decoding. Both are made by `scripts/train_tiny.py`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of a bundled model."""
    return Path(str(resources.files(__name__).joinpath(name)))


DEFAULT_MODEL = "vdiff-tiny"
DEFAULT_VERIFIER = "vdiff-tiny-ar"
