"""What comes out of the engine: finished requests and the events of each step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` answers."""

    index: int
    text: str
    token_ids: list[int]  # without the end token and what follows
    finish_reason: str  # "stop" (end token or stop string), "length" or "abort"
    forwards: int  # model calls this answer took part in


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times are `time.time()` seconds, durations milliseconds."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    prompt_tokens: int
    generated_tokens: int
    forwards: int  # of all answers together
    tokens_per_forward: float

    @property
    def queued_ms(self) -> float:
        return 1000 * ((self.first_scheduled_time or self.finished_time) - self.arrival_time)

    @property
    def denoise_ms(self) -> float:
        return 1000 * (self.finished_time - (self.first_scheduled_time or self.finished_time))


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    seed: int


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one step committed for one answer; made only when somebody listens."""

    request_id: str
    index: int  # which of the n answers
    step: int  # steps of this answer so far
    forwards: int
    positions: tuple[int, ...]  # committed in this step, relative to the answer's start
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    text_delta: str  # append-only, valid UTF-8, never a part of a stop string
    tokens_committed: int
    tokens_total: int
    canvas: str | None = field(default=None)  # the whole current text, with diffusion.visualize
