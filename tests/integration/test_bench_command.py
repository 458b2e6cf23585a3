"""`vdiff bench decoders`: every decoder of the bundled model, a table, JSON and a plot."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.integration.test_offline import vdiff

pytestmark = pytest.mark.integration


def test_every_decoder_is_measured(tmp_path: Path) -> None:
    done = vdiff("bench", "decoders", "--limit", 6, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens/forward" in done.stdout and "low_confidence, one token per step" in done.stdout
    data = json.loads((tmp_path / "decoders.json").read_text())
    assert (data["model"], data["verifier"], data["lines"]) == ("vdiff-tiny", "vdiff-tiny-ar", 6)
    by_name = {d["name"]: d for d in data["decoders"]}
    assert {n.split()[0].rstrip(",") for n in by_name} >= {
        "low_confidence",
        "random",
        "entropy",
        "threshold",
        "klass",
        "apd",
    }
    for d in data["decoders"]:
        assert (
            d["total"] == 6
            and d["low"] <= d["accuracy"] <= d["high"]
            and d["tokens_per_forward"] > 0
        )
    assert (
        by_name["threshold 0.9"]["tokens_per_forward"]
        > by_name["low_confidence, one token per step"]["tokens_per_forward"]
    )
    assert by_name["apd R=0.7"]["acceptance_rate"] > 0
    marks = ET.parse(tmp_path / "decoders.svg").getroot().iter("{http://www.w3.org/2000/svg}title")
    assert {mark.text.split(":")[0] for mark in marks if mark.text} >= set(by_name)


def test_a_bad_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"messages": []}\n')
    done = vdiff("bench", "decoders", "--input", tmp_path / "set.jsonl", "--output", tmp_path)
    assert (done.returncode, "line 1" in done.stderr, len(done.stderr.strip().splitlines())) == (
        2,
        True,
        1,
    )
