"""The models and datasets that ship with vdiff, and the scorer of their evaluation set.

`vdiff-tiny` answers six kinds of questions with checkable answers; `vdiff-tiny-ar` is a small
autoregressive model with the same tokenizer, for Adaptive Parallel Decoding. Both are made by
`scripts/train_tiny.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any


def folder(name: str) -> Path:
    """The folder of a bundled model."""
    return Path(str(resources.files(__name__).joinpath(name)))


DEFAULT_MODEL = "vdiff-tiny"
DEFAULT_VERIFIER = "vdiff-tiny-ar"


def questions() -> list[dict[str, Any]]:
    """The evaluation set of vdiff-tiny as a dataset: 480 held-out questions, 80 of each kind."""
    lines = (folder(DEFAULT_MODEL) / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    made = []
    for line in lines:
        row = json.loads(line)
        about = row["metadata"]
        made.append(
            {
                "id": row["custom_id"],
                "kind": about["kind"],
                "input": row["messages"][0]["content"],
                "reference": about["answer"],
            }
        )
    return made


# What `{"bundled": name}` names in a request for an evaluation.
DATASETS: Mapping[str, Callable[[], list[dict[str, Any]]]] = {"vdiff-tiny": questions}
