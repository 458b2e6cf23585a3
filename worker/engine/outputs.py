"""Outputs of the engine: finished requests and the events of each step. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.engine.likelihood import LogLikelihood


LOWEST_LOGPROB = (
    -9999.0
)  # of a token that was ruled out and written all the same; OpenAI's number. JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-softmax of the model's logits, at the step that committed the token."""

    token_id: int
    logprob: float
    top: tuple[
        tuple[int, float], ...
    ] = ()  # the likeliest tokens, best first, without those that were ruled out

    def __post_init__(self) -> None:
        object.__setattr__(self, "logprob", max(self.logprob, LOWEST_LOGPROB))
        object.__setattr__(self, "top", tuple(pair for pair in self.top if pair[1] > -math.inf))


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` answers."""

    index: int
    text: str
    token_ids: list[int]  # without the end token and what follows
    finish_reason: str  # "stop" (end token or stop string), "length" or "abort"
    forwards: int  # denoising forwards this answer took part in
    logprobs: list[TokenLogprob] | None = None  # one for each token, when asked for
    acceptance_rate: float | None = None  # APD: accepted of drafted tokens
    cache_refreshes: int = 0  # forwards that recomputed everything for an approximate cache
    prefill_forwards: int = 0  # forwards that only stored the prompt's K/V
    verifier_seconds: float = 0.0
    closed_early: bool = (
        False  # of response_format: the ending was written because no token was left for more
    )


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
    prompt_done_time: float | None = (
        None  # the first denoising forward began: prompts stored in chunks end here
    )
    acceptance_rate: float | None = None
    cache_refreshes: int = 0
    prefill_forwards: int = 0
    verifier_seconds: float = 0.0
    device_seconds: float = (
        0.0  # its share of the steps that it was in; over all requests: the time of all steps
    )

    @property
    def queued_ms(self) -> float:
        """In the engine, until its first step."""
        return 1000 * ((self.first_scheduled_time or self.finished_time) - self.arrival_time)

    @property
    def prompt_ms(self) -> float:
        """Storing the prompt, where it took steps of its own."""
        began = self.first_scheduled_time or self.finished_time
        return 1000 * max((self.prompt_done_time or began) - began, 0.0)

    @property
    def denoise_ms(self) -> float:
        """From the first denoising step to the end."""
        return 1000 * (
            self.finished_time
            - (self.prompt_done_time or self.first_scheduled_time or self.finished_time)
        )

    @property
    def first_commit_ms(self) -> float | None:
        """From arrival to the first committed token."""
        return (
            None
            if self.first_token_time is None
            else 1000 * (self.first_token_time - self.arrival_time)
        )


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    seed: int
    likelihood: LogLikelihood | None = None  # of a score


@dataclass(frozen=True, slots=True)
class InfillOutput:
    text: str  # with the holes filled
    holes: list[str]
    output: RequestOutput


@dataclass(frozen=True, slots=True)
class StepEvent:
    """The tokens that one step committed for one answer; made only for requests with a listener."""

    request_id: str
    index: int  # which of the n answers
    step: int  # steps of this answer so far
    forwards: int
    positions: tuple[
        int, ...
    ]  # committed (or, by an editing rule, replaced) in this step, from the answer's start
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    text_delta: str  # append-only, valid UTF-8, never a part of a stop string
    tokens_committed: int
    tokens_total: int
    canvas: str | None = field(default=None)  # the whole current text, with diffusion.visualize
    provisional: dict[str, Any] | None = (
        None  # {positions, token_ids}: shown but not committed (uniform models, APD drafts)
    )
    logprobs: tuple[TokenLogprob, ...] = ()  # of the positions, when asked for
