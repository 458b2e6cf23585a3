"""The engine calls of a claimed job, by its task: generate, fill holes, score; and the result built
from them.

`submit` hands it over and gives one handle, `result_of` builds the endpoint's own response object.
`worker.runner` does the rest, which is the same for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from shared.errors import SchemaViolated
from shared.jobs import echo, infill, response_objects, scoring
from shared.jobs.responses import build_result
from shared.jobs.responses import usage_of as ledger_usage
from shared.jobs.tasks import InfillTask, PromptsTask, ResponseTask, ScoreTask, task_of
from shared.model_card import ModelCard
from shared.response_format import schema_of
from shared.sampling_params import SamplingParams
from shared.schema_check import violation
from shared.token_bytes import offsets, spell
from shared.tokenizer import TokenizerWrapper
from worker.engine.outputs import RequestOutput, StepEvent, TokenLogprob
from worker.prompts import Prompts
from worker.scores import Scores, ScoresOutput

Listener = Callable[[StepEvent], None]


class Handle(Protocol):
    def result(self, timeout: float | None = None) -> RequestOutput: ...
    def abort(self) -> None: ...


class Engine(Protocol):
    """The part of `worker.engine.VDiffEngine` that jobs use."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def tokenizer(self) -> TokenizerWrapper: ...

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        listener: Listener | None = None,
        canvas: Sequence[int] | None = None,
    ) -> Handle: ...

    def submit_score(
        self,
        request_id: str,
        context: Sequence[int],
        target: Sequence[int],
        *,
        method: str | None = None,
        mc_num: int = 128,
        seed: int = 0,
        cfg_scale: float = 0.0,
        top: int = 0,
        priority: int = 0,
        listener: Listener | None = None,
    ) -> Handle: ...


def submit(
    engine: Engine, job: Any, params: SamplingParams, *, priority: int, listener: Listener
) -> Handle:
    """Hand the job to the engine. Raises what the engine raises."""
    request_id, ids, task = (
        f"{job.id}/{job.attempt}",
        list(job.prompt_token_ids),
        task_of(job.params),
    )
    if isinstance(task, ScoreTask):
        return Scores(engine, request_id, ids, params, task, priority=priority, listener=listener)
    if isinstance(task, PromptsTask):
        return Prompts(engine, request_id, ids, params, task, priority=priority, listener=listener)
    if isinstance(task, InfillTask):
        begin = task.holes()[0][0]
        return engine.submit(
            request_id,
            ids[:begin],
            params,
            priority=priority,
            listener=listener,
            canvas=ids[begin:],
        )
    return engine.submit(request_id, ids, params, priority=priority, listener=listener)


def answers_of(job: Any, params: SamplingParams) -> int:
    """Return how many answers the job writes: n for each prompt."""
    task = task_of(job.params)
    return params.n * (len(task.tokens) if isinstance(task, PromptsTask) else 1)


def writes_text(job: Any) -> bool:
    """Return whether the job generates tokens, rather than score some."""
    return not isinstance(task_of(job.params), ScoreTask)


def result_of(
    job: Any, output: RequestOutput, numbers: Mapping[str, Any], engine: Engine
) -> dict[str, Any]:
    """The response object of the job's endpoint.

    Args:
        numbers: `timing` and `diffusion` as `worker.runner.report` gives them.
    """
    task = task_of(job.params)
    common = {"job_id": job.id, "model": job.model, "created": int(job.created_at.timestamp())}
    extras = {
        "job_id": job.id,
        "forwards": numbers["diffusion"]["forwards"],
        "tokens_per_forward": numbers["diffusion"]["tokens_per_forward"],
        "attempts": job.attempt,
        "timing": numbers["timing"],
        "seed": output.seed,
        **closed_early(output),
    }
    if isinstance(task, ScoreTask):
        assert isinstance(output, ScoresOutput)
        del extras["tokens_per_forward"]  # none are written
        if task.echo:
            return _echo_result(job, task, output, common, extras, engine.tokenizer)
        return _score_result(task, output, common, extras)
    if isinstance(task, InfillTask):
        ids, ends = list(job.prompt_token_ids), engine.card.end_token_ids
        filled = [
            infill.filled(task, ids, c.token_ids, ends, engine.tokenizer) for c in output.outputs
        ]
        holes = sum(end - begin for begin, end in task.holes())
        return infill.build_result(
            **common, choices=filled, prompt_tokens=len(ids) - holes, extras=extras
        )
    choices: list[dict[str, Any]] = [
        {
            "index": c.index,
            "text": c.text,
            "token_ids": list(c.token_ids),
            "finish_reason": c.finish_reason,
            "logprobs": None
            if c.logprobs is None
            else logprobs_of(c.logprobs, engine.tokenizer, c.text),
        }
        for c in output.outputs
    ]
    prompt_tokens = len(job.prompt_token_ids)
    if isinstance(task, ResponseTask):
        return response_objects.build_result(
            **common,
            completed=int(time.time()),
            params=job.params,
            choice=choices[0],
            prompt_tokens=prompt_tokens,
            extras=extras,
        )
    return build_result(
        **common, endpoint=job.endpoint, choices=choices, prompt_tokens=prompt_tokens, extras=extras
    )


def check_answers(params: SamplingParams, output: RequestOutput) -> None:
    """Compare finished structured answers with their schema as it was sent. Raises SchemaViolated."""
    if params.response_format is None:
        return
    schema = schema_of(params.response_format)
    for choice in output.outputs:
        wrong = violation(schema, choice.text) if choice.finish_reason == "stop" else None
        if wrong is not None:
            raise SchemaViolated(
                f"choice {choice.index} violates response_format: {wrong}", param="response_format"
            )


def usage_of(result: Mapping[str, Any]) -> dict[str, int]:
    """A result's usage by the names that the ledger has, whatever its endpoint calls them."""
    usage: dict[str, int] = result["usage"]
    if "input_tokens" not in usage:
        return usage
    return ledger_usage(usage["input_tokens"], usage["output_tokens"])


def closed_early(output: RequestOutput) -> dict[str, Any]:
    """Which choices' JSON was closed for want of tokens, where any was."""
    indices = [c.index for c in output.outputs if c.closed_early]
    return {"closed_early": indices} if indices else {}


def _score_result(
    task: ScoreTask, output: ScoresOutput, common: Mapping[str, Any], extras: Mapping[str, Any]
) -> dict[str, Any]:
    scores = []
    for scored in output.scores:
        assert scored is not None
        scores.append(
            scoring.Score(scored.value, scored.standard_error, scored.token_logprobs, scored.greedy)
        )
    return scoring.build_result(**common, task=task, scores=scores, extras=extras)


def _echo_result(
    job: Any,
    task: ScoreTask,
    output: ScoresOutput,
    common: Mapping[str, Any],
    extras: Mapping[str, Any],
    tokenizer: TokenizerWrapper,
) -> dict[str, Any]:
    ends = output.end_token_ids
    choices, completion_tokens = [], 0
    pieces = task.pieces(list(job.prompt_token_ids))
    for (context, target), scored, written in zip(
        pieces, output.scores, output.generated, strict=True
    ):
        tokens = [
            TokenLogprob(token, 0.0) for token in context
        ]  # the first has no log-probability: null below
        if scored is not None:
            values, tops = scored.token_logprobs or [], scored.tops or [()] * len(target)
            tokens += [TokenLogprob(*one) for one in zip(target, values, tops, strict=True)]
        finish_reason = "length"
        if written is not None:
            tokens += written.logprobs or []
            ended = written.token_ids[0] in ends
            finish_reason = "stop" if ended else "length"
            completion_tokens += 0 if ended else 1
        text = tokenizer.decode([*context, *target], skip_special_tokens=False) + (
            written.text if written else ""
        )
        told = logprobs_of(tokens, tokenizer, text, chosen=True, specials=True)
        told[0] = {**told[0], "logprob": None, "top": None}
        choices.append({"text": text, "finish_reason": finish_reason, "logprobs": told})
    return echo.build_result(
        **common,
        choices=choices,
        prompt_tokens=len(job.prompt_token_ids),
        completion_tokens=completion_tokens,
        extras=extras,
    )


def logprobs_of(
    tokens: Sequence[TokenLogprob],
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    chosen: bool = False,
    specials: bool = False,
) -> list[dict[str, Any]]:
    """Return log-probabilities with the tokens' text and bytes, as `shared.jobs.responses` takes
    them.

    Args:
        text: what the tokens make, which offsets count in.
        chosen: include the token itself in `top` where it is not among the likeliest.
        specials: the text has special tokens in it.
    """
    known = tokenizer.token_bytes
    pieces = [
        b"" if t.token_id in known.special and not specials else known.of(t.token_id)
        for t in tokens
    ]
    places = offsets(pieces, text)

    def one(token_id: int) -> tuple[str, list[int]]:
        raw = known.of(token_id)
        return spell(raw), list(raw)

    def top(t: TokenLogprob) -> list[list[Any]]:
        own = (
            []
            if not chosen or any(i == t.token_id for i, _ in t.top)
            else [(t.token_id, t.logprob)]
        )
        return [[*one(i), value] for i, value in (*t.top, *own)]

    made = []
    for t, place in zip(tokens, places, strict=True):
        name, raw = one(t.token_id)
        made.append(
            {"token": name, "bytes": raw, "offset": place, "logprob": t.logprob, "top": top(t)}
        )
    return made
