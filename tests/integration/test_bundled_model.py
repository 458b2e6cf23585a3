"""The bundled model answers what its card says, through the engine; its evaluation set is the one
that the recipe makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from shared.sampling_params import resolve_params
from tests.integration.conftest import ROOT
from vdiff import bundled
from worker.engine import VDiffConfig, VDiffEngine

pytestmark = pytest.mark.integration
MODEL = bundled.folder(bundled.DEFAULT_MODEL)
PER_KIND = 20
TARGETS = {"low_confidence": 0.95, "threshold": 0.90}  # one token per step; threshold 0.9


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict[str, Any]]]:
    by_kind = defaultdict(list)
    for line in (MODEL / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        by_kind[question["metadata"]["kind"]].append(question)
    return by_kind


@pytest.fixture(scope="module")
def engine() -> Iterator[VDiffEngine]:
    with VDiffEngine(VDiffConfig(model=str(MODEL), device="cpu", max_num_seqs=16)) as engine:
        yield engine


@pytest.mark.parametrize("algorithm", list(TARGETS))
def test_accuracy(
    engine: VDiffEngine, questions: dict[str, list[dict[str, Any]]], algorithm: str
) -> None:
    assert len(questions) >= 6
    handles = []
    for kind, lines in questions.items():
        for line in lines[:PER_KIND]:
            ids = engine.tokenizer.encode_chat(line["messages"])
            fields = {"max_tokens": line["max_tokens"], "diffusion": {"algorithm": algorithm}}
            params = resolve_params(fields, card=engine.card, prompt_tokens=len(ids), chat=True)
            handles.append(
                (kind, line["metadata"]["answer"], engine.submit(line["custom_id"], ids, params))
            )
    right: dict[str, int] = defaultdict(int)
    for kind, answer, handle in handles:
        right[kind] += handle.result(60).outputs[0].text == answer
    assert {
        kind: right[kind] for kind in questions if right[kind] < TARGETS[algorithm] * PER_KIND
    } == {}


def test_greedy_without_being_asked(engine: VDiffEngine) -> None:
    params = resolve_params({}, card=engine.card, prompt_tokens=5, chat=True)
    assert params.temperature == 0.0


def test_the_shipped_set_is_what_the_recipe_draws() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "tiny_tasks.py"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert made.stdout == (MODEL / "eval.jsonl").read_text(encoding="utf-8")


def test_the_models_fit() -> None:
    for name in ("vdiff-tiny", "vdiff-tiny-ar"):
        assert sum(file.stat().st_size for file in bundled.folder(name).iterdir()) <= 12_000_000


def test_scorer(tmp_path: Any) -> None:
    """Right, wrong and missing answers."""
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    lines = [{"custom_id": f"{i}", "metadata": {"kind": "k", "answer": str(i)}} for i in range(4)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers.write_text(
        '{"custom_id": "0", "text": "0"}\n{"custom_id": "1", "text": "0"}\n{"custom_id": "2", "text": "2"}\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "vdiff.bundled.evaluate", questions, answers],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "2/4" in done.stdout and "the first is 3" in done.stderr
