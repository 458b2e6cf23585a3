"""Engines that tests of this folder share, by golden family; each is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import VDiffConfig, VDiffEngine

GetEngine = Callable[[str], VDiffEngine]


def make_engine(family: str, **options: object) -> VDiffEngine:
    """A new engine on a golden checkpoint; Dream's with its verifier."""
    given: dict[str, object] = {
        "model": str(GOLDEN / family),
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
    }
    if family == "dream":
        given["verifier"] = str(GOLDEN / "dream" / "apd_verifier")
    return VDiffEngine(VDiffConfig(**{**given, **options}))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def engine_of() -> Iterator[GetEngine]:
    made: dict[str, VDiffEngine] = {}

    def get(family: str) -> VDiffEngine:
        if family not in made:
            made[family] = make_engine(family)
        return made[family]

    yield get
    for engine in made.values():
        engine.shutdown()
