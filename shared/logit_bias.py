"""OpenAI's `logit_bias`: what is added to the logits of single tokens, checked. No torch.

In a request it is an object of token ids, written as strings because JSON knows no other keys, to
numbers from -100 to 100. Inside it is a tuple of pairs, so that `SamplingParams` stays immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidParameter
from shared.model_card import ModelCard

BOUND = 100.0
MAX_TOKENS = 1024
BAN = -1e9
"""What -100 adds: such a token is never committed while any other may be. Finite, so that entropies and sums stay numbers."""

Bias = tuple[tuple[int, float], ...]


def logit_bias_of(value: Any, card: ModelCard) -> Bias:
    """The pairs of a request's object (or those of `SamplingParams`), by token id.

    Raises:
        InvalidParameter: with the entry's name, `logit_bias.17`.
    """
    if isinstance(value, tuple):
        value = {str(token): number for token, number in value}
    if not isinstance(value, Mapping) or len(value) > MAX_TOKENS:
        message = f"logit_bias must be an object of at most {MAX_TOKENS} token ids to numbers"
        raise InvalidParameter(message, param="logit_bias")
    made = {}
    for key, number in value.items():
        if number is None:
            continue
        token = _token(str(key), card)
        param = f"logit_bias.{token}"
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not -BOUND <= number <= BOUND
        ):
            raise InvalidParameter(
                f"{param} must be a number from {-BOUND:g} to {BOUND:g}", param=param
            )
        if token in made:
            raise InvalidParameter(f"{param} is there twice", param=param)
        made[token] = float(number)
    if sum(number == -BOUND for number in made.values()) >= card.vocab_size - (
        card.mask_token_id >= 0
    ):
        raise InvalidParameter("logit_bias bans every token", param="logit_bias")
    return tuple(sorted((token, number) for token, number in made.items() if number != 0))


def _token(key: str, card: ModelCard) -> int:
    param = f"logit_bias.{key[:80]}"
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < card.vocab_size):
        message = f"logit_bias: {key[:80]!r} is no token id, from 0 to {card.vocab_size - 1}"
        raise InvalidParameter(message, param=param)
    if int(key) == card.mask_token_id:
        raise InvalidParameter(f"{param} is the mask token, which is never committed", param=param)
    return int(key)


def added(bias: Bias) -> list[float]:
    """Return the bias that is added to each token's logit."""
    return [BAN if number == -BOUND else number for _, number in bias]
