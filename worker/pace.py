"""The worker's throughput between its last two heartbeats, for the dashboard; `/metrics` has the
totals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from shared.metrics import WORKER

_ENGINE = ("forwards", "steps", "sequence_steps", "step_seconds")


class Pace:
    """Differences of counters; called by the heartbeat's thread alone."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._at = now()
        self._before = dict.fromkeys((*_ENGINE, "tokens"), 0.0)

    def since_last(self, engine: Mapping[str, Any]) -> dict[str, float | None]:
        """Tokens per second; and tokens per forward of a sequence, mean batch and milliseconds of a
        step while it stepped.
        """
        now = self._now()
        counts = {name: float(engine[name]) for name in _ENGINE}
        counts["tokens"] = WORKER.get_sample_value("vdiff_tokens_committed_total") or 0.0
        more = {name: value - self._before[name] for name, value in counts.items()}
        seconds, self._at, self._before = now - self._at, now, counts
        return {
            "seconds": round(seconds, 3),
            "tokens_per_second": _ratio(more["tokens"], seconds),
            "tokens_per_forward": _ratio(more["tokens"], more["sequence_steps"]),
            "batch": _ratio(more["sequence_steps"], more["steps"]),
            "step_ms": _ratio(1000 * more["step_seconds"], more["steps"]),
        }


def _ratio(amount: float, over: float) -> float | None:
    return round(amount / over, 4) if over > 0 else None
