"""`echo: true` on `/v1/completions`: the prompt's own tokens scored, as lm-eval asks. Its body,
checked; and its answer. Pure.

OpenAI's models are autoregressive: each token's log-probability has all before it, and one forward
gives them all. A diffusion model predicts masks: what comes back here is the chain rule, one
forward for each token of the prompt, each with everything after it masked. `vdiff.estimate` says
so. `/v1/loglikelihood` costs less, since it knows where the answer begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared import checks
from shared.algorithms import CHAIN_RULE
from shared.diffusion_params import DiffusionParams
from shared.errors import InvalidParameter, MissingParameter, PromptTooLong
from shared.jobs.fields import labels_of, model_of, opened
from shared.jobs.no_ops import changes_nothing
from shared.jobs.requests import Resolved, prompt_of
from shared.jobs.responses import (
    COMPLETIONS,
    LOGLIKELIHOOD,
    completion_logprobs,
    response_id,
    usage_of,
)
from shared.jobs.scoring import MAX_PAIRS, ScoreRequest, checked_parse_special
from shared.jobs.tasks import ScoreTask
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL
from shared.sampling_params import MAX_LOGPROBS, resolve_params
from shared.tokenizer import TokenizerWrapper

GENERATION = ("temperature", "top_p", "top_k", "seed")
FIELDS = ("model", "prompt", "max_tokens", "logprobs", "echo", PARSE_SPECIAL, *GENERATION)
ESTIMATE = "chain_rule"


def is_asked(body: Any) -> bool:
    return isinstance(body, Mapping) and body.get("echo") is True


@dataclass(frozen=True, slots=True)
class EchoRequest(ScoreRequest):
    """Prompts to score from their second token on."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # how the token after them is drawn
    generate: bool = False
    top: int = 0

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        if LOGLIKELIHOOD not in card.capabilities.get("endpoints", ()):
            raise InvalidParameter(
                f"{card.name} gives no likelihoods; leave echo out", param="echo"
            )
        ids: list[int] = []
        sizes = []
        for (text, _), (path, _) in zip(self.pairs, self.paths, strict=True):
            prompt = self.tokens(text, path, card, tokenizer)
            if len(prompt) + self.generate > card.context_length:
                message = f"{path} has {len(prompt)} tokens; the context of {card.name} is {card.context_length}"
                raise PromptTooLong(message, param=path)
            ids += prompt
            sizes.append((1, len(prompt) - 1))
        task = ScoreTask(CHAIN_RULE, tuple(sizes), top=self.top, echo=True, generate=self.generate)
        fields = {**self.fields, "max_tokens": 1, "logprobs": self.top}
        params = resolve_params(fields, card=card, prompt_tokens=1)
        generated = len(sizes) if self.generate else 0
        params = replace(
            params,
            max_tokens=max(sum(target for _, target in sizes) + generated, 1),
            diffusion=DiffusionParams(algorithm=CHAIN_RULE, cache="none"),
        )
        return Resolved(ids, params, len(ids) + generated, task)


def parse(body: Any) -> ScoreRequest:
    """Raises InvalidParameter, UnknownParameter, MissingParameter."""
    refused = "does not go with echo, which scores the prompt; leave it out"
    given = opened(COMPLETIONS, body, FIELDS, refused=refused)
    model, labels = model_of(given), labels_of(given)
    for name in ("prompt", "logprobs"):
        if name not in given:
            raise MissingParameter(
                f"{name} is required with echo, which scores the prompt", param=name
            )
    tokens, top = given.get("max_tokens", 0), given["logprobs"]
    if isinstance(tokens, bool) or tokens not in (0, 1):
        raise InvalidParameter(
            "max_tokens must be 0 or 1 with echo, which scores the prompt", param="max_tokens"
        )
    checks.integer(top, "logprobs", 0, MAX_LOGPROBS)
    fields = {name: given[name] for name in GENERATION if name in given}
    if not tokens:
        for name, value in fields.items():
            off = (
                name == "seed"
                or (name == "temperature" and value in (0, 1))
                or changes_nothing(name, value, given)
            )
            if not off:
                raise InvalidParameter(
                    f"{name} has no effect with max_tokens 0: nothing is drawn", param=name
                )
    prompts, paths = _prompts(given["prompt"])
    pairs: tuple[tuple[str | list[int], str | list[int]], ...] = tuple((p, []) for p in prompts)
    return EchoRequest(
        COMPLETIONS,
        model,
        pairs,
        tuple((path, path) for path in paths),
        labels,
        parse_special=checked_parse_special(given, pairs),
        fields=fields,
        generate=bool(tokens),
        top=top,
    )


def _prompts(value: Any) -> tuple[list[str | list[int]], list[str]]:
    """One prompt or several, each text or token ids, with their names."""
    several = (
        isinstance(value, list) and bool(value) and all(isinstance(v, str | list) for v in value)
    )
    if several and len(value) > MAX_PAIRS:
        raise InvalidParameter(f"prompt takes at most {MAX_PAIRS} prompts", param="prompt")
    given = [(v, f"prompt[{i}]") for i, v in enumerate(value)] if several else [(value, "prompt")]
    made: list[str | list[int]] = []
    for one, path in given:
        text, ids = prompt_of(one, path)
        made.append(text if text is not None else ids or [])
    return made, [path for _, path in given]


def build_result(
    *,
    job_id: str,
    model: str,
    created: int,
    choices: Sequence[Mapping[str, Any]],
    prompt_tokens: int,
    completion_tokens: int,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """OpenAI's completion with the prompt in front.

    Args:
        choices: {text, finish_reason, logprobs} each; logprobs as `completion_logprobs` takes them,
            null for a prompt's first.
    """
    return {
        "id": response_id(COMPLETIONS, job_id),
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": i,
                "text": choice["text"],
                "logprobs": completion_logprobs(choice["logprobs"]),
                "finish_reason": choice["finish_reason"],
            }
            for i, choice in enumerate(choices)
        ],
        "usage": usage_of(prompt_tokens, completion_tokens),
        "vdiff": {**extras, "estimate": ESTIMATE},
    }
