"""Stop strings that are control tokens (`shared.control_tokens`): found by their ids. No torch.

An answer's text does not show a token that the tokenizer flags as special, and no answer holds the
mask token.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import InvalidParameter
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper


def stop_ids(stop: Sequence[str], tokenizer: TokenizerWrapper) -> frozenset[int]:
    """Return the ids of the stop strings that are the text of one control token."""
    ids = tokenizer.control.ids
    return frozenset(ids[text] for text in stop if text in ids)


def check_stops(stop: Sequence[str], card: ModelCard, tokenizer: TokenizerWrapper) -> None:
    """Refuse stop strings that no answer can match.

    Raises:
        InvalidParameter: one is the mask, or has it or a token that no text shows beside other
            text.
    """
    control, mask = tokenizer.control, _mask_text(card, tokenizer)
    for text in stop:
        if text == mask:
            raise InvalidParameter(
                f"stop: {text!r} is the mask token, which no answer holds", param="stop"
            )
        if text in control.ids:
            continue
        inside = [found for found in control.find(text) if found in control.hidden]
        if mask is not None and mask in text:
            inside.append(mask)
        if inside:
            message = (
                f"stop: {text!r} has the special token {inside[0]!r} beside other text, "
                "which an answer's text never shows; give the token alone"
            )
            raise InvalidParameter(message, param="stop")


def _mask_text(card: ModelCard, tokenizer: TokenizerWrapper) -> str | None:
    """Return the text of the mask, which not every tokenizer flags as special; None where the
    family has no mask.
    """
    if card.mask_token_id < 0:
        return None
    return tokenizer.decode([card.mask_token_id], skip_special_tokens=False) or None
