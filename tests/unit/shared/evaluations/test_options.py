"""Choices of the form for evaluations."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from shared.evaluations.graders import TYPES
from shared.evaluations.service import EvaluationService
from shared.settings import load_settings


@pytest.mark.parametrize("allowed", [True, False])
def test_options_are_what_a_request_may_name(allowed: bool) -> None:
    settings = load_settings({"VDIFF_CODE_GRADERS": str(allowed)})
    datasets = {
        "two": lambda: [{"input": "a", "reference": "b"}, {"input": "c"}],
        "one": lambda: [{"q": 1}],
    }
    nothing = cast(Any, None)  # neither database nor jobs are asked
    options = EvaluationService(
        nothing, nothing, nothing, datasets, settings, asyncio.Event(), nothing
    ).options()
    assert options["datasets"] == [
        {"name": "two", "items": 2, "columns": ["input", "reference"]},
        {"name": "one", "items": 1, "columns": ["q"]},
    ]
    assert options["graders"] == [kind for kind in TYPES if allowed or kind != "code"]
