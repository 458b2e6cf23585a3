"""Helm's own rendering of the chart, where its library is installed (`make test-helm`): the
standalone files, byte for byte.

`test_chart.py` renders it without Helm, by the few words that `chart.py` understands; here both
make the same of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit import chart as ours
from tests.unit.test_chart import LEVEL, PARTS, PLACED, TOKEN

ROOT = Path(__file__).resolve().parents[2]
CHART = ours.CHART
helm = pytest.importorskip("helm_python", reason="`make test-helm` installs it")


def test_default_values_give_the_standalone_files() -> None:
    with helm.Chart.load(CHART) as chart:
        made = {
            name.rsplit("/", 1)[1]: text
            for name, text in chart.render(name="vdiff").items()
            if text.strip()
        }
    standalone = ROOT / "deploy/kubernetes/standalone"
    files = {
        f.name: f.read_text("utf-8")
        for f in standalone.glob("*.yaml")
        if f.name != "kustomization.yaml"
    }
    assert made == files


def made_by_helm(values: dict[str, Any]) -> dict[str, list[Any]]:
    with helm.Chart.load(CHART) as chart:
        made = {
            name.rsplit("/", 1)[1]: text
            for name, text in chart.render(values, name="vdiff").items()
        }
    return {name: list(yaml.safe_load_all(text)) for name, text in made.items() if text.strip()}


CHANGED: list[dict[str, Any]] = [
    {
        "api": {"replicas": 5},
        "worker": {"model": "m/x", "servedModelName": "x"},
        "secretName": "other",
    },
    {"image": {"pullSecrets": [{"name": "a"}, {"name": "b"}]}, "databasePort": 6432},
    {"keda": {"enabled": False}, "networkPolicies": {"enabled": False}, "fileStorePort": 443},
    {"worker": {"drainSeconds": 600}},
    {
        "worker": {"modelsClaim": "models", "maxSurge": 0, "maxUnavailable": 1},
        "fileStorePort": 9000,
    },
    {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "1m"},
        "tracesPort": 443,
    },
    *(
        {part: {**PLACED, "extraEnv": [TOKEN, LEVEL, {"name": "X", "value": "<&\"'"}]}}
        for part in PARTS
    ),
    *(
        {part: {"resources": {"limits": {"nvidia.com/gpu": 1}, "requests": {"cpu": "1.5"}}}}
        for part in PARTS
    ),
]


@pytest.mark.parametrize("values", CHANGED)
def test_helm_makes_of_other_values_what_our_tests_make(values: dict[str, Any]) -> None:
    made = {
        name: list(yaml.safe_load_all(text))
        for name, text in ours.render(ours.values(**values)).items()
    }
    assert made_by_helm(values) == made


def test_helm_refuses_what_the_schema_refuses() -> None:
    for wrong in ({"worker": {"gpu": 1}}, {"worker": {"model": "m/x"}}):
        with pytest.raises(helm.HelmError, match="worker"):
            made_by_helm(wrong)


def test_lint() -> None:
    report = helm.lint(CHART, strict=True)
    assert report["errors"] == [] and [m for m in report["messages"] if m["severity"] > 1] == []
