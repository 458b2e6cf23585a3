"""Several prompts in one request of `/v1/completions`: its body, checked. Pure.

OpenAI answers them in one object, the `n` choices of the first prompt first. Here they are one job,
whose prompts the engine decodes beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shared.errors import InvalidParameter, InvalidRequest
from shared.jobs.requests import ParsedRequest, Resolved, refuse_without_text
from shared.jobs.requests import parse as parse_one
from shared.jobs.responses import COMPLETIONS
from shared.jobs.tasks import PromptsTask
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper

MAX_PROMPTS = 128
MAX_CHOICES = 256  # of all prompts together: they are one result


def are_several(body: Any) -> bool:
    """Return whether `prompt` is a list of two or more prompts; a list of one is a prompt, a list
    of integers token ids.
    """
    value = body.get("prompt") if isinstance(body, Mapping) else None
    return (
        isinstance(value, list) and len(value) > 1 and all(isinstance(v, str | list) for v in value)
    )


@dataclass(frozen=True, slots=True)
class PromptsRequest:
    """One request for each prompt; all but the prompt is the same in them."""

    each: tuple[ParsedRequest, ...]
    stream: bool = False
    include_usage: bool = False

    @property
    def endpoint(self) -> str:
        return self.each[0].endpoint

    @property
    def model(self) -> str:
        return self.each[0].model

    @property
    def metadata(self) -> dict[str, str]:
        return self.each[0].metadata

    @property
    def fields(self) -> dict[str, Any]:
        return self.each[0].fields

    @property
    def characters(self) -> int:
        return sum(one.characters for one in self.each)

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Raises InvalidParameter, PromptTooLong; `param` says which prompt."""
        ids: list[int] = []
        counts: list[int] = []
        for i, one in enumerate(self.each):
            try:
                tokens = one.tokens(card, tokenizer)
            except InvalidRequest as exc:
                raise _of_prompt(exc, i) from exc
            ids += tokens
            counts.append(len(tokens))
        longest = max(range(len(counts)), key=counts.__getitem__)
        try:
            params = self.each[longest].params(card, tokenizer, counts[longest])
        except InvalidRequest as exc:
            raise _of_prompt(exc, longest) from exc
        if params.n * len(counts) > MAX_CHOICES:
            message = f"n {params.n} for {len(counts)} prompts are more than {MAX_CHOICES} choices in one request"
            raise InvalidParameter(message, param="n")
        task = PromptsTask(tuple(counts))
        return Resolved(ids, params, len(ids) + params.max_tokens * params.n * len(counts), task)


def _of_prompt(exc: InvalidRequest, i: int) -> InvalidRequest:
    if exc.param != "prompt":
        return exc
    return type(exc)(
        exc.message.replace("prompt", f"prompt[{i}]", 1), param=f"prompt[{i}]", code=exc.code
    )


def parse(body: Mapping[str, Any], *, streaming: bool) -> PromptsRequest:
    """Raises InvalidParameter, UnknownParameter, MissingParameter."""
    prompts = body["prompt"]
    if len(prompts) > MAX_PROMPTS:
        raise InvalidParameter(
            f"prompt takes at most {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt"
        )
    first = parse_one(COMPLETIONS, {**body, "prompt": "-"}, streaming=streaming)
    if first.stream:
        raise InvalidParameter(
            "stream takes one prompt; send several without, or as requests of their own",
            param="stream",
        )
    each = []
    for i, prompt in enumerate(prompts):
        try:
            one = parse_one(COMPLETIONS, {"model": first.model, "prompt": prompt}, streaming=False)
        except InvalidRequest as exc:
            raise _of_prompt(exc, i) from exc
        each.append(replace(first, prompt=one.prompt, prompt_token_ids=one.prompt_token_ids))
    if first.parse_special is False and all(one.prompt is None for one in each):
        refuse_without_text()
    return PromptsRequest(tuple(each))
