"""Statistics of a configuration's samples, and the comparison of two configurations. Pure.

An answer that is an error (its job failed, a grader could not tell) counts neither as right nor as
wrong; the results say how many there are, and are worth the less the more there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shared import statistics
from shared.errors import Conflict
from shared.evaluations.graders import ERROR, PASSED

HISTOGRAM_POINTS = 60


class NothingToCompare(Conflict):
    code = "nothing_to_compare"


def rounded(value: Any) -> Any:
    """Six significant digits are more than any of this is sure of."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def scores_of(rows: Sequence[Any]) -> tuple[dict[Hashable, list[float]], dict[Hashable, Hashable]]:
    """Group the rows of `repository.numbers`: item's key -> its repeats' scores; and its cluster."""
    scores: dict[Hashable, list[float]] = {}
    clusters: dict[Hashable, Hashable] = {}
    for row in rows:
        if row.outcome != ERROR:
            scores.setdefault(row.key, []).append(float(row.outcome == PASSED))
            clusters[row.key] = row.cluster
    return scores, clusters


def results_of(rows: Sequence[Any]) -> dict[str, Any]:
    """Everything that is known of a configuration so far. Times in the engine; queueing is told
    apart.
    """
    scores, clusters = scores_of(rows)
    accuracy = None
    if scores:
        accuracy = asdict(
            statistics.accuracy(list(scores.values()), [clusters[key] for key in scores])
        )
    answered = [row for row in rows if row.completion_tokens is not None]
    latencies = [row.latency_ms for row in answered]
    tokens, forwards = (
        sum(row.completion_tokens for row in answered),
        sum(row.forwards or 0 for row in answered),
    )
    began = [row.started_at for row in answered if row.started_at is not None]
    ended = [row.finished_at for row in answered if row.finished_at is not None]
    wall = (max(ended) - min(began)).total_seconds() if began and ended else None
    device = [row.device_ms for row in answered if row.device_ms is not None]
    made: dict[str, Any] = {
        "outcomes": {
            name: count for name, count in sorted(Counter(row.outcome for row in rows).items())
        },
        "accuracy": accuracy,
        "latency_ms": {
            "p50": statistics.quantile(latencies, 0.5),
            "p95": statistics.quantile(latencies, 0.95),
            "mean": sum(latencies) / len(latencies) if latencies else None,
        },
        "queued_ms": {"p50": statistics.quantile([row.queued_ms or 0.0 for row in answered], 0.5)},
        "completion_tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / forwards if forwards else None,
        # Of one answer, as its client sees it; and of all together, as the machine does it.
        "tokens_per_second": 1000 * tokens / sum(latencies) if sum(latencies) else None,
        "throughput_tokens_per_second": tokens / wall if wall else None,
        "wall_seconds": wall,
        "device_seconds": sum(device) / 1000 if device else None,
        "device_seconds_per_1000_tokens": sum(device) / tokens if device and tokens else None,
    }
    return dict(rounded(made))


def latency_curve(rows: Sequence[Any]) -> list[tuple[float, float]]:
    """(milliseconds, share of the answers that took no longer): the distribution, at as many points
    as a plot shows.
    """
    values = sorted(row.latency_ms for row in rows if row.completion_tokens is not None)
    if not values:
        return []
    shares = [i / HISTOGRAM_POINTS for i in range(HISTOGRAM_POINTS + 1)]
    return [(float(statistics.quantile(values, share) or 0.0), share) for share in shares]


def compare(
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
) -> dict[str, Any]:
    """Two configurations on the items that both answered. Raises NothingToCompare."""
    (one, clusters), (other, more) = scores_of(first), scores_of(second)
    if not one.keys() & other.keys():
        raise NothingToCompare(
            "the two have no item that both answered; they need the same dataset"
        )
    made = statistics.compare(one, other, {**clusters, **more}, seed=seed, resamples=resamples)
    tests: Mapping[str, Any] = asdict(made.mcnemar)
    return dict(
        rounded(
            {
                **asdict(made),
                "mcnemar": dict(tests),
                "bootstrap": {"seed": seed, "resamples": resamples},
            }
        )
    )
