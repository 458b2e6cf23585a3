"""deploy/prometheus and deploy/grafana: every query parses as PromQL and names series that exist,
with labels they have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import REGISTRY

from api.routes.metrics import batch_metrics, database_metrics, database_up, webhook_metrics
from shared.metrics import DELIVERY, WORKER

ROOT = Path(__file__).resolve().parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/vdiff.json").read_text(encoding="utf-8"))
PROMETHEUS_OWN = {"up"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def families() -> Iterator[Any]:
    yield from (f for f in REGISTRY.collect() if f.name.startswith("vdiff"))
    yield from WORKER.collect()
    yield from DELIVERY.collect()
    yield from database_metrics(*_nothing())
    yield database_up(True)
    yield from batch_metrics((), 0, ())
    yield from (f for f in webhook_metrics((), (), ()) if f.type == "gauge")


def _nothing() -> list[Any]:
    import inspect

    return [
        {} if "dict" in str(p.annotation) else ()
        for p in inspect.signature(database_metrics).parameters.values()
    ]


def series() -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    own = {f.name + suffix for f in families() for suffix in suffixes[f.type]}
    return own | {rule["record"] for rule in rules() if "record" in rule} | PROMETHEUS_OWN


def selectors(node: Any) -> Iterator[str]:
    """Names of all series in a parsed query, whatever its shape."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str | float | int):
            yield from selectors(inner)
    for inner in getattr(node, "args", None) or ():
        yield from selectors(inner)


def queries() -> list[tuple[str, str]]:
    found = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return found + [
        (panel["title"], t["expr"]) for panel in DASHBOARD["panels"] for t in panel["targets"]
    ]


@pytest.mark.parametrize(("where", "query"), queries())
def test_query_names_what_exists(where: str, query: str) -> None:
    names = list(selectors(promql_parser.parse(query)))
    assert names and [name for name in names if name not in series()] == [], where


def test_the_check_notices_what_does_not_exist() -> None:
    names = list(
        selectors(
            promql_parser.parse(
                "sum(rate(vdiff_nothing_total[5m])) / on (model) max(vdiff_workers)"
            )
        )
    )
    assert (
        names == ["vdiff_nothing_total", "vdiff_workers"] and "vdiff_nothing_total" not in series()
    )


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {n for _, q in queries() for n in selectors(promql_parser.parse(q))}
    missing = [f.name for f in families() if not any(n.startswith(f.name) for n in shown)]
    assert missing == []


def test_every_metric_has_words_and_a_unit() -> None:
    for family in families():
        assert len(family.documentation) > 8, family.name
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_per_forward", "_per_step")), (
                f"{family.name}: the unit stands last"
            )


def test_alerts_say_what_they_mean_and_are_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "warn")
            assert f"`{rule['alert']}`" in page, rule["alert"]


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        g = panel["gridPos"]
        cells = {
            (x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])
        }
        assert not cells & taken and g["x"] + g["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_sides_of_a_comparison_meet() -> None:
    """Prometheus pairs elements whose labels are all the same: beside `sum by (model)` an `outcome`
    meets nothing, ever.
    """
    (expr,) = [rule["expr"] for rule in rules() if rule.get("alert") == "VdiffJobsFail"]
    left, right = expr.split(" > 0.05 * ")
    assert left.startswith("sum by (model) (") and right.startswith("sum by (model) (")
    assert 'outcome="failed"' in left and "outcome" not in right
