"""States, statistics and health of the engine. No torch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum


class EngineState(Enum):
    UNINITIALIZED = "uninitialized"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"  # steps are being made
    DRAINING = "draining"  # finishes what it has, takes nothing new
    SHUTDOWN = "shutdown"
    ERROR = "error"


BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a step, up to and with
_BATCH_NAMES = (*map(str, BATCH_BOUNDS), "+Inf")


@dataclass(slots=True)
class EngineStats:
    """Counters since the start; written by the step loop alone."""

    requests_finished: int = 0
    requests_failed: int = 0
    requests_aborted: int = 0
    tokens_generated: int = 0
    forwards: int = 0  # model calls
    steps: int = 0  # engine steps
    sequence_steps: int = 0  # sum over steps of the sequences in them
    step_seconds: float = 0.0
    batch_sizes: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(_BATCH_NAMES, 0)
    )  # steps by their sequences
    prefill_forwards: int = 0  # forwards of a sequence that only stored its prompt's K/V
    cache_refreshes: int = 0  # of finished sequences: full forwards for an approximate cache

    def note_step(self, sequences: int, seconds: float) -> None:
        self.steps += 1
        self.sequence_steps += sequences
        self.step_seconds += seconds
        self.batch_sizes[_BATCH_NAMES[bisect_left(BATCH_BOUNDS, sequences)]] += 1

    @property
    def mean_batch(self) -> float:
        return self.sequence_steps / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class HealthStatus:
    healthy: bool
    state: EngineState
    running: int
    waiting: int
    seconds_since_step: float | None
    detail: str = ""
