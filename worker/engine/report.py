"""From a request's state to what the outside sees: the event of a step, the finished output."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shared.algorithms import UNIFORM
from shared.tokenizer import TokenizerWrapper
from worker.engine.decoder import Commit
from worker.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, StepEvent
from worker.engine.request import Answer, EngineRequest


def charge(run: Sequence[tuple[Answer, int]], seconds: float) -> None:
    """Share a step's time out among those whom it served, by the rows that each had in it."""
    rows = sum(count for _, count in run)
    for answer, count in run:
        answer.request.device_seconds += seconds * (count / rows if rows else 1 / len(run))


def event_of(commit: Commit, delta: str, tokenizer: TokenizerWrapper) -> StepEvent:
    """A commit as its listener hears of it; `delta` is the text that may now be shown in addition."""
    answer = commit.answer
    return StepEvent(
        request_id=answer.request.request_id,
        index=answer.index,
        step=answer.steps,
        forwards=answer.forwards,
        positions=tuple(commit.positions),
        token_ids=tuple(commit.token_ids),
        confidences=tuple(commit.confidences),
        text_delta=delta,
        tokens_committed=answer.committed if answer.end is None else answer.end,
        tokens_total=answer.limit if answer.end is None else answer.end,
        canvas=canvas_text(answer, commit, tokenizer)
        if answer.params.diffusion.visualize
        else None,
        provisional=commit.provisional,
        logprobs=tuple(commit.logprobs),
    )


def canvas_text(answer: Answer, commit: Commit, tokenizer: TokenizerWrapper) -> str:
    """The whole current text; masks are shown as U+2591, one each."""
    if answer.finish_reason is not None:
        return answer.text.text
    shown = dict(enumerate(answer.canvas[: min(answer.window.stop, answer.limit)]))
    if commit.provisional is not None and answer.regime == UNIFORM:
        ids = zip(commit.provisional["positions"], commit.provisional["token_ids"], strict=True)
        shown.update({p: token for p, token in ids if p in shown})
    pieces, run = [], list[int]()
    for token in [*shown.values(), answer.mask]:
        if token == answer.mask:
            pieces.append(tokenizer.decode(run))
            pieces.append("\u2591")
            run = []
        else:
            run.append(token)
    return "".join(pieces[:-1])


def output_of(request: EngineRequest) -> RequestOutput:
    """Return the output of a finished or aborted request."""
    outputs = [completion_of(answer) for answer in request.sequences]
    tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.forwards for o in outputs)
    drafted, accepted = (
        sum(a.drafted for a in request.sequences),
        sum(a.accepted for a in request.sequences),
    )
    metrics = RequestMetrics(
        arrival_time=request.arrival_time,
        first_scheduled_time=request.first_scheduled_time,
        first_token_time=request.first_token_time,
        finished_time=time.time(),
        prompt_tokens=len(request.prompt_token_ids),
        generated_tokens=tokens,
        forwards=forwards,
        tokens_per_forward=tokens / forwards if forwards else 0.0,
        prompt_done_time=request.prompt_done_time,
        acceptance_rate=accepted / drafted if drafted else None,
        cache_refreshes=sum(o.cache_refreshes for o in outputs),
        prefill_forwards=sum(o.prefill_forwards for o in outputs),
        verifier_seconds=sum(o.verifier_seconds for o in outputs),
        device_seconds=request.device_seconds,
    )
    ids = request.prompt_token_ids
    return RequestOutput(
        request.request_id,
        request.prompt,
        ids,
        outputs,
        not request.aborted,
        metrics,
        request.seed,
        None if request.score is None or request.aborted else request.score.result(),
    )


def completion_of(answer: Answer) -> CompletionOutput:
    """One answer: its tokens up to the end, or as far as they are committed without a gap."""
    if answer.finish_reason is None:  # aborted
        answer.text.update(answer.canvas[: answer.prefix], final=True)
    end = answer.prefix if answer.end is None else answer.end
    logprobs = None
    if answer.params.logprobs is not None:
        logprobs = [answer.logprobs[p] for p in range(end) if p in answer.logprobs]
    return CompletionOutput(
        answer.index,
        answer.text.text,
        answer.canvas[:end],
        answer.finish_reason or "abort",
        answer.forwards,
        logprobs,
        answer.accepted / answer.drafted if answer.drafted else None,
        answer.cache_refreshes,
        answer.prefill_forwards,
        answer.verifier_seconds,
        answer.closed_early,
    )
