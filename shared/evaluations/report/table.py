"""Tables of a report as text, for every format and for the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SUMMARY = (
    "configuration",
    "passed",
    "95% interval",
    "± other questions",
    "± other seeds",
    "errors",
    "tokens/forward",
    "forwards",
    "p50 ms",
    "p95 ms",
    "tokens/s",
    "device s",
)
COMPARISON = (
    "configuration",
    "difference",
    "95% interval",
    "p (McNemar)",
    "only first",
    "only this",
    "detectable",
)


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of shares, with its sign."""
    return "" if value is None else f"{100 * value:+.1f}"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def status_of(configuration: Mapping[str, Any]) -> str:
    """Nothing for one that came to its end; else how many of its answers its numbers are of."""
    progress, status = configuration["progress"], str(configuration["status"])
    if status == "completed":
        return ""
    so_far = (
        f"{sum(progress[name] for name in ('passed', 'failed', 'error'))} of {progress['total']}"
    )
    return so_far if status == "in_progress" else f"{status}, {so_far}"


def summary_row(configuration: Mapping[str, Any]) -> list[str]:
    """One configuration, in the order of SUMMARY."""
    name, status = configuration["name"], status_of(configuration)
    label = f"{name} ({status})" if status else name
    results = configuration["results"]
    if results is None:
        return [label, *[""] * (len(SUMMARY) - 1)]
    accuracy, latency = results["accuracy"] or {}, results["latency_ms"]
    interval = f"{percent(accuracy['low'])} to {percent(accuracy['high'])}" if accuracy else ""
    return [
        label,
        percent(accuracy.get("mean")),
        interval,
        percent(accuracy.get("standard_error"), 2),
        percent(accuracy.get("monte_carlo_error"), 2),
        str(results["outcomes"].get("error", 0) or ""),
        number(results["tokens_per_forward"]),
        number(results["forwards"], 0),
        number(latency["p50"], 0),
        number(latency["p95"], 0),
        number(results["tokens_per_second"], 0),
        number(results["device_seconds"], 1),
    ]


def comparison_row(comparison: Mapping[str, Any]) -> list[str]:
    """One configuration against the first, in the order of COMPARISON; differences in percentage
    points.
    """
    mcnemar = comparison["mcnemar"]
    return [
        comparison["second_name"],
        points(comparison["difference"]),
        f"{points(comparison['low'])} to {points(comparison['high'])}",
        f"{mcnemar['p_value']:.3g}",
        str(mcnemar["only_first"]),
        str(mcnemar["only_second"]),
        f"{100 * comparison['minimum_detectable_effect']:.1f}",
    ]


def settings_of(configuration: Mapping[str, Any]) -> str:
    """Return a configuration's settings on one line."""
    fields = json.dumps(configuration["fields"], ensure_ascii=False)
    return f"{configuration['model']} {fields} seeds {configuration['seeds']}"


def verdicts_of(item: Mapping[str, Any]) -> str:
    """Return the verdicts about an answer as text."""
    if item["error"]:
        return f"{item['error']['code']}: {item['error'].get('message', '')}"
    said = []
    for grader in item["graders"]:
        if grader["passed"] is True:
            continue
        reason = (
            f"{grader['error']['code']}: {grader['error']['message']}"
            if grader.get("error")
            else "no"
        )
        taken = f" (took {grader['extracted']!r})" if "extracted" in grader else ""
        said.append(f"{grader['name']}: {reason}{taken}")
    return "; ".join(said)
