"""Inputs of the engine as token ids: prompts in all their forms, texts with holes, and the checks
of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.algorithms import FULL
from shared.errors import InvalidParameter, MissingParameter
from shared.jobs.tasks import InfillTask
from shared.model_card import ModelCard
from shared.prompt_ids import check_ids, message_ids, parse_special_of, prompt_ids
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper

Prompt = str | Mapping[str, Any]
Prompts = list[str] | list[dict[str, Any]] | list[Prompt] | tuple[Prompt, ...]


def tokenized(
    prompt: Prompt, card: ModelCard, tokenizer: TokenizerWrapper
) -> tuple[str | None, list[int]]:
    """Return a prompt's text and token ids: of a string, or {prompt | prompt_token_ids | messages}.

    Raises:
        MissingParameter: it is none of these.
        InvalidParameter: it has the mask token.
    """
    given: Mapping[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else prompt
    parse_special = parse_special_of(given)
    if given.get("messages") is not None:
        messages, variables = given["messages"], given.get("chat_template_kwargs")
        text = tokenizer.apply_chat_template(messages, variables=variables)
        ids = message_ids(
            messages, "messages", card, tokenizer, variables=variables, parse_special=parse_special
        )
        return text, ids
    if given.get("prompt_token_ids") is not None:
        return None, prompt_ids(given["prompt_token_ids"], "prompt_token_ids", card, tokenizer)
    if given.get("prompt") is not None:
        return given["prompt"], prompt_ids(
            given["prompt"], "prompt", card, tokenizer, parse_special=parse_special
        )
    raise MissingParameter(
        "a prompt needs one of prompt, prompt_token_ids, messages", param="prompt"
    )


def checked_ids(
    card: ModelCard,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    canvas: Sequence[int] | None,
) -> list[int]:
    """The prompt's token ids. Raises InvalidParameter for what this model cannot be asked."""
    ids = list(prompt_token_ids)
    if not ids and canvas is None:
        raise InvalidParameter("the prompt is empty", param="prompt")
    if canvas is not None:
        _check_canvas(card, params, canvas)
    check_ids(ids, "prompt_token_ids", card)
    if canvas and (min(canvas) < 0 or max(canvas) >= card.vocab_size):
        raise InvalidParameter(f"token ids must be from 0 to {card.vocab_size - 1}", param="canvas")
    if len(ids) + params.max_tokens > card.context_length:
        message = f"{len(ids)} prompt tokens and max_tokens {params.max_tokens} exceed {card.context_length}"
        raise InvalidParameter(message, param="max_tokens")
    return ids


def _check_canvas(card: ModelCard, params: SamplingParams, canvas: Sequence[int]) -> None:
    if card.regime != FULL:
        raise InvalidParameter(f"{card.name} cannot see what follows a hole", param="canvas")
    if params.diffusion.algorithm == "apd":
        raise InvalidParameter(
            "apd goes from left to right and fills no holes", param="diffusion.algorithm"
        )
    if params.diffusion.max_lookahead is not None:
        raise InvalidParameter(
            "max_lookahead hides what follows a hole", param="diffusion.max_lookahead"
        )
    if params.response_format is not None:
        raise InvalidParameter(
            "response_format goes from left to right and fits no holes", param="response_format"
        )
    if card.mask_token_id not in canvas:
        raise InvalidParameter("nothing is masked", param="canvas")
    if params.max_tokens != len(canvas):
        raise InvalidParameter("max_tokens must be the canvas's length", param="max_tokens")


def holed(
    parts: Sequence[str | int], card: ModelCard, tokenizer: TokenizerWrapper
) -> tuple[InfillTask, list[int]]:
    """A text with holes: where they lie, and the token ids of all of it with the mask in the holes.

    Raises:
        InvalidParameter: no hole, a hole of no tokens, or a model that cannot see what follows a
            hole.
    """
    if card.regime != FULL:
        raise InvalidParameter(f"{card.name} cannot see what follows a hole", param="parts")
    ids: list[int] = []
    counts = []
    for i, part in enumerate(parts):
        if isinstance(part, bool) or (isinstance(part, int) and part < 1):
            raise InvalidParameter("a hole has at least one token", param=f"parts[{i}]")
        at = f"parts[{i}]"
        piece = (
            prompt_ids(part, at, card, tokenizer)
            if isinstance(part, str)
            else [card.mask_token_id] * part
        )
        counts.append(len(piece))
        ids += piece
    if all(isinstance(part, str) for part in parts):
        raise InvalidParameter("there is no hole to fill", param="parts")
    return InfillTask(tuple(parts), tuple(counts)), ids
