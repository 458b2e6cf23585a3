"""Stop strings that are special tokens. An answer's text does not show those, so they are found by their ids. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import InvalidParameter
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper


def stop_ids(stop: Sequence[str], tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return the ids of the stop strings that are the text of one special token."""
    hidden = tokenizer.control.hidden
    return frozenset(hidden[text] for text in stop if text in hidden)


def check_stops(stop: Sequence[str], card: ModelCard, tokenizer: TokenizerWrapper) -> None:
    """Refuse stop strings that no answer can match.

    Raises:
        InvalidParameter: one has a special token beside other text, or is the mask.
    """
    hidden = tokenizer.control.hidden
    for text in stop:
        if hidden.get(text) == card.mask_token_id:
            raise InvalidParameter(f"stop: {text!r} is the mask token, which no answer holds", param="stop")
        inside = [] if text in hidden else [found for found in tokenizer.control.find(text) if found in hidden]
        if inside:
            message = (
                f"stop: {text!r} has the special token {inside[0]!r} beside other text, "
                "which an answer's text never shows; give the token alone"
            )
            raise InvalidParameter(message, param="stop")
