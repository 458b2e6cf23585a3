"""Sums of the statistics of several workers, in the form of one worker's. Pure.

Only counters mean anything in the sum; what is of the moment (memory, jobs that run) is asked of
live workers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _added(before: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name, also within objects; all else is left out."""
    made: dict[str, Any] = {}
    for name in {**before, **more}:
        one, other = before.get(name), more.get(name)
        if isinstance(one, Mapping) or isinstance(other, Mapping):
            made[name] = _added(
                one if isinstance(one, Mapping) else {}, other if isinstance(other, Mapping) else {}
            )
        elif _number(one) is not None or _number(other) is not None:
            made[name] = (_number(one) or 0) + (_number(other) or 0)
    return made


def folded(stats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One object for all; `metrics` ([name, labels, value], as `shared.metrics.snapshot` gives) add
    up by series.
    """
    total: dict[str, Any] = {}
    series: dict[tuple[Any, ...], list[Any]] = {}
    for one in stats:
        total = _added(total, {name: value for name, value in one.items() if name != "metrics"})
        for name, labels, value in one.get("metrics", ()):
            sample = series.setdefault((name, *sorted(labels.items())), [name, labels, 0.0])
            sample[2] += value
    total.pop("recent", None)  # how fast it was between two heartbeats
    return {**total, "metrics": list(series.values())}
