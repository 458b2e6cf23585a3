"""`/v1/infill`: a text with holes at any place. Its body, checked; and its answer. Pure.

`parts` is the text in pieces: a string is fixed, `{"hole": n}` is a hole of n tokens. Everything is
seen while a hole is filled, what follows it too. Each piece is tokenised by itself. A model that
wants less than a hole puts its end token there:
the hole's text ends before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared import checks
from shared.errors import InvalidParameter, MissingParameter, PromptTooLong, UnknownParameter
from shared.jobs.fields import labels_of, model_of, opened
from shared.jobs.requests import Resolved, refuse_without_text
from shared.jobs.responses import INFILL, response_id, usage_of
from shared.jobs.tasks import InfillTask
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL, parse_special_of, prompt_ids
from shared.sampling_params import resolve_params
from shared.tokenizer import TokenizerWrapper

FIELDS = (
    "model",
    "parts",
    PARSE_SPECIAL,
    "n",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "logit_bias",
    "diffusion",
)
MAX_PARTS = 1000
_NOT_IN_HOLES = ("max_forwards", "draft_token_ids", "draft_noise")


@dataclass(frozen=True, slots=True)
class InfillRequest:
    model: str
    parts: tuple[str | int, ...]  # fixed text, or a hole of so many tokens
    fields: dict[str, Any]
    metadata: dict[str, str]
    endpoint: str = INFILL
    stream: bool = False
    include_usage: bool = False
    parse_special: bool | None = None

    @property
    def characters(self) -> int:
        return sum(len(part) for part in self.parts if isinstance(part, str))

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Raises InvalidParameter, PromptTooLong."""
        ids: list[int] = []
        counts = []
        for i, part in enumerate(self.parts):
            if isinstance(part, int):
                if len(ids) + part > card.context_length:  # before anything is built
                    raise _too_long(card, f"parts[{i}].hole")
                piece = [card.mask_token_id] * part
            else:
                piece = prompt_ids(
                    part, f"parts[{i}]", card, tokenizer, parse_special=self.parse_special
                )
            counts.append(len(piece))
            ids += piece
            if len(ids) > card.context_length:
                raise _too_long(card, "parts")
        task = InfillTask(self.parts, tuple(counts))
        span = len(ids) - task.holes()[0][0]  # from the first hole to the end
        try:
            params = resolve_params(
                {**self.fields, "max_tokens": span}, card=card, prompt_tokens=len(ids) - span
            )
        except InvalidParameter as exc:
            # What bounds blocks and steps here is no field of the body.
            message = exc.message.replace(
                "max_tokens", "the tokens from the first hole to the end,"
            )
            raise InvalidParameter(message, param=exc.param) from exc
        if params.diffusion.algorithm == "apd":
            message = "apd goes from left to right and fills no holes"
            raise InvalidParameter(message, param="diffusion.algorithm")
        if params.diffusion.max_lookahead is not None:
            message = "diffusion.max_lookahead hides what follows a hole; leave it out"
            raise InvalidParameter(message, param="diffusion.max_lookahead")
        return Resolved(ids, params, len(ids) - span + span * params.n, task)


def _too_long(card: ModelCard, param: str) -> PromptTooLong:
    return PromptTooLong(
        f"parts have more than {card.context_length} tokens, the context of {card.name}",
        param=param,
    )


def parse(body: Any) -> InfillRequest:
    """Raises InvalidParameter, UnknownParameter, MissingParameter."""
    given = opened(INFILL, body, FIELDS)
    model, labels = model_of(given), labels_of(given)
    if "parts" not in given:
        raise MissingParameter("parts is required", param="parts")
    fields = {k: v for k, v in given.items() if k in FIELDS[3:]}
    diffusion = fields.get("diffusion")
    for name in _NOT_IN_HOLES:
        if isinstance(diffusion, Mapping) and diffusion.get(name) is not None:
            raise InvalidParameter(
                f"diffusion.{name} does not fit {INFILL}", param=f"diffusion.{name}"
            )
    parts = parts_of(given["parts"])
    parse_special = parse_special_of(given)
    if parse_special is False and not any(isinstance(part, str) for part in parts):
        refuse_without_text()
    return InfillRequest(model, parts, fields, labels, parse_special=parse_special)


def parts_of(value: Any) -> tuple[str | int, ...]:
    """Raises InvalidParameter."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise InvalidParameter(f"parts must be a list of 1 to {MAX_PARTS} parts", param="parts")
    made: list[str | int] = []
    for i, part in enumerate(value):
        at = f"parts[{i}]"
        if isinstance(part, str):
            made.append(part)
            continue
        if not isinstance(part, dict) or part.get("hole") is None:
            raise InvalidParameter(f'{at} must be a string or {{"hole": tokens}}', param=at)
        for name, other in part.items():
            if name != "hole" and other is not None:
                raise UnknownParameter(
                    f"{at}.{name[:80]} is not a field of a hole", param=f"{at}.{name[:80]}"
                )
        made.append(checks.integer(part["hole"], f"{at}.hole", 1, checks.MOST))
    if not any(isinstance(part, int) for part in made):
        raise InvalidParameter('parts has no hole; a hole is {"hole": tokens}', param="parts")
    return tuple(made)


def filled(
    task: InfillTask,
    ids: Sequence[int],
    answer: Sequence[int],
    ends: Sequence[int],
    tokenizer: TokenizerWrapper,
) -> tuple[list[str], str, int]:
    """The holes' texts, the whole text and how many tokens the holes took.

    Args:
        ids: of all parts, masks in the holes.
        answer: what was decoded from the first hole on.
        ends: the model's end tokens.
    """
    holes = task.holes()
    whole = [*ids[: holes[0][0]], *answer]
    texts, count = [], 0
    for begin, end in holes:
        hole = whole[begin:end]
        stop = next((i for i, token in enumerate(hole) if token in ends), len(hole))
        texts.append(tokenizer.decode(hole[:stop]))
        count += stop
    pieces = iter(texts)
    return (
        texts,
        "".join(part if isinstance(part, str) else next(pieces) for part in task.parts),
        count,
    )


def build_result(
    *,
    job_id: str,
    model: str,
    created: int,
    choices: Sequence[tuple[list[str], str, int]],
    prompt_tokens: int,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """The response object.

    Args:
        choices: as `filled` gives them.
        prompt_tokens: of the fixed parts.
    """
    return {
        "id": response_id(INFILL, job_id),
        "object": "infill",
        "created": created,
        "model": model,
        "choices": [
            {"index": i, "text": text, "holes": holes, "finish_reason": "stop"}
            for i, (holes, text, _) in enumerate(choices)
        ],
        "usage": usage_of(prompt_tokens, sum(count for _, _, count in choices)),
        "vdiff": dict(extras),
    }
