"""A report as one HTML page: styles and plots inside, nothing loaded, no script, every text
escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from shared.evaluations.report import table
from shared.plots import Point, curves, scatter

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _points(report: Mapping[str, Any]) -> list[Point]:
    made = []
    for c in report["evaluation"]["configurations"]:
        results = c["results"]
        if results and results["accuracy"] and results["tokens_per_forward"]:
            accuracy = results["accuracy"]
            title = f"{c['name']}: {accuracy['mean']:.1%}, {results['tokens_per_forward']:.2f} tokens per forward"
            made.append(
                Point(
                    c["name"],
                    c["name"],
                    results["tokens_per_forward"],
                    accuracy["mean"],
                    accuracy["low"],
                    accuracy["high"],
                    title,
                )
            )
    return made


def _when(seconds: int | None) -> str:
    return (
        ""
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def _pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def page(report: Mapping[str, Any]) -> str:
    points = _points(report)
    lines = {name: line for name, line in report["latency_curves"].items() if line}
    items: dict[str, list[Any]] = {}
    for item in report["not_passed"]:
        items.setdefault(item["configuration"], []).append(item)
    # The plots escape their texts themselves; nothing else is marked as safe.
    return _template().render(
        evaluation=report["evaluation"],
        comparisons=report["comparisons"],
        table=table,
        policy=POLICY,
        accuracy_plot=Markup(
            scatter(points, x_label="tokens per forward", y_label="passed, with 95% interval")
        )
        if points
        else None,
        latency_plot=Markup(
            curves(lines, x_label="latency of an answer, ms", y_label="share of answers")
        )
        if lines
        else None,
        items=items,
        when=_when,
        pretty=_pretty,
    )
