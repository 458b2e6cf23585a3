"""A report as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from shared.evaluations.report import table

ITEMS_SHOWN = 10
CELL = 200  # characters
NUMBERS_FROM = 1  # the first column is text, the others are numbers
_SPECIAL = re.compile(r"([\\`*_{}\[\]|#])")


def cell(text: Any) -> str:
    """On one line, with nothing that Markdown or HTML would read as its own."""
    flat = " ".join(str(text).split())
    shown = flat if len(flat) <= CELL else flat[: CELL - 1] + "…"
    return escape(_SPECIAL.sub(r"\\\1", shown))


def rows(head: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    rule = ["---" if i < NUMBERS_FROM else "---:" for i in range(len(head))]
    return [
        f"| {' | '.join(line)} |"
        for line in ([*map(cell, head)], rule, *([*map(cell, row)] for row in body))
    ]


def markdown(report: Mapping[str, Any]) -> str:
    evaluation = report["evaluation"]
    configurations = evaluation["configurations"]
    progress = evaluation["progress"]
    lines = [
        f"# {cell(evaluation['name'])}",
        "",
        f"{evaluation['items']} items, {len(configurations)} configurations, {progress['graded']} of {progress['total']} "
        f"answers graded, {evaluation['status']}. `{evaluation['id']}`",
        "",
        *rows(table.SUMMARY, [table.summary_row(c) for c in configurations]),
    ]
    if report["comparisons"]:
        first = report["comparisons"][0]["first_name"]
        lines += [
            "",
            f"## Compared with {cell(first)}",
            "",
            "In percentage points, on the items that both answered.",
            "",
            *rows(table.COMPARISON, [table.comparison_row(c) for c in report["comparisons"]]),
        ]
    lines += ["", "## Settings", ""]
    lines += [f"- {cell(c['name'])}: {cell(table.settings_of(c))}" for c in configurations]
    lines += [f"- graders: {cell(json.dumps(evaluation['graders'], ensure_ascii=False))}"]
    for c in configurations:
        if c["error"] is not None:
            lines.append(f"- {cell(c['name'])} failed: {cell(c['error']['message'])}")
        lines += [
            f"- {cell(c['name'])}, {e['count']} times {cell(e['code'])}: {cell(e['message'])}"
            for e in c["top_errors"]
        ]
    if report["not_passed"]:
        lines += ["", "## Items that did not pass", ""]
        head = ("configuration", "item", "outcome", "reference", "output", "why")
        body = [
            (
                i["configuration"],
                i["item"],
                i["outcome"],
                i["data"].get("reference", ""),
                i["output"] or "",
                table.verdicts_of(i),
            )
            for i in report["not_passed"][:ITEMS_SHOWN]
        ]
        lines += rows(head, body)
    return "\n".join(lines) + "\n"
