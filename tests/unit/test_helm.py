"""Helm's own rendering of the chart, where its library is installed (`make test-helm`): the standalone files, byte for byte.

`test_kubernetes.py` renders it without Helm, which is enough as long as the chart uses `{{ .Values.x }}` and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "vdiff"
helm = pytest.importorskip("helm_python", reason="`make test-helm` installs it")


def test_default_values_give_the_standalone_files() -> None:
    with helm.Chart.load(CHART) as chart:
        made = {name.rsplit("/", 1)[1]: text for name, text in chart.render(name="vdiff").items()}
    standalone = ROOT / "deploy/kubernetes/standalone"
    files = {f.name: f.read_text("utf-8") for f in standalone.glob("*.yaml") if f.name != "kustomization.yaml"}
    assert made == files


def test_other_values_reach_what_they_are_for() -> None:
    values = {"api": {"replicas": 5}, "worker": {"model": "GSAI-ML/LLaDA-8B-Instruct"}, "secretName": "other"}
    with helm.Chart.load(CHART) as chart:
        made = "".join(chart.render(values, name="vdiff").values())
    assert "replicas: 5" in made and "GSAI-ML/LLaDA-8B-Instruct" in made and "{name: other, key: api-key}" in made


def test_lint() -> None:
    report = helm.lint(CHART, strict=True)
    assert report["errors"] == [] and [m for m in report["messages"] if m["severity"] > 1] == []
