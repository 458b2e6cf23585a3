"""Prompts as token ids: the one place where a prompt's text, messages or ids become what the engine
reads. Pure.

The mask token stands for what is not decoded yet. A prompt that held one would have the model see a
hole where the client wrote text, so every prompt with it is refused: by its id, and by its text in
a raw prompt. In messages, special tokens that are written out stay text unless the request says
`parse_special: true`; raw prompts are read with them unless it says `parse_special: false`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.control_tokens import strings_in
from shared.errors import InvalidParameter, PromptTooLong
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper

PARSE_SPECIAL = "parse_special"
PIECE_CHARACTERS = 65_536
PIECE_SLACK_TOKENS = 64  # that a piece may have more because it was cut at no word's end


def parse_special_of(given: Mapping[str, Any]) -> bool | None:
    """Return the request's `parse_special`; None when it leaves that to the endpoint. Raises
    InvalidParameter.
    """
    value = given.get(PARSE_SPECIAL)
    if value is not None and not isinstance(value, bool):
        raise InvalidParameter(f"{PARSE_SPECIAL} must be true or false", param=PARSE_SPECIAL)
    return value


def prompt_ids(
    prompt: str | Sequence[int],
    param: str,
    card: ModelCard,
    tokenizer: TokenizerWrapper,
    *,
    parse_special: bool | None = None,
) -> list[int]:
    """Return the token ids of a raw prompt: a text, or ids.

    Args:
        param: the field that it came from.
        parse_special: whether special tokens that are written out are read as tokens; None: they
            are.

    Raises:
        InvalidParameter: an id is no token of the model, or the prompt has the mask token.
    """
    if isinstance(prompt, str):
        refuse_too_long([prompt], param, card, tokenizer)
        return check_ids(
            _named(tokenizer.encode, prompt, param, parse_special=parse_special is not False),
            param,
            card,
        )
    return check_ids(list(prompt), param, card)


def message_ids(
    messages: Sequence[Mapping[str, Any]],
    param: str,
    card: ModelCard,
    tokenizer: TokenizerWrapper,
    *,
    variables: Mapping[str, Any] | None = None,
    parse_special: bool | None = None,
) -> list[int]:
    """Return the token ids of rendered messages.

    Args:
        param, parse_special: as of `prompt_ids`; None: special tokens in messages are text.

    Raises:
        InvalidParameter, UnknownParameter: the template refuses them, or the rendering has the mask
            token.
    """
    refuse_long_messages(messages, param, card, tokenizer, variables=variables)
    ids = tokenizer.encode_chat(messages, variables, parse_special=bool(parse_special))
    return check_ids(ids, param, card)


def count_characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the length of all strings in the messages; a text under several names of one message
    counts once.
    """
    return sum(sum(map(len, set(strings_in(message)))) for message in messages)


def refuse_long_messages(
    messages: Sequence[Mapping[str, Any]],
    param: str,
    card: ModelCard,
    tokenizer: TokenizerWrapper,
    *,
    variables: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> None:
    """Call `refuse_too_long` for the rendering of long messages: the template decides which fields
    it includes.

    Raises:
        PromptTooLong: as `refuse_too_long`.
        InvalidParameter, UnknownParameter: the template refuses them.
    """
    characters = count_characters(messages) + sum(map(len, strings_in(variables)))
    if characters > PIECE_CHARACTERS:
        rendering = tokenizer.apply_chat_template(messages, variables=variables)
        refuse_too_long([rendering], param, card, tokenizer, most=most)


def refuse_too_long(
    texts: Sequence[str],
    param: str,
    card: ModelCard,
    tokenizer: TokenizerWrapper,
    *,
    most: int | None = None,
) -> None:
    """Count the tokens of long texts in pieces, so that text far beyond the context is never
    encoded as a whole.

    A tokenizer takes about 200 bytes for each token while it encodes a text: 2 MB of dense text
    took 440 MB.

    Args:
        most: tokens that they may have; None: the model's context.

    Raises:
        PromptTooLong: they have more.
    """
    if sum(map(len, texts)) <= PIECE_CHARACTERS:
        return
    most = card.context_length if most is None else most
    count = 0
    for text in texts:
        for at in range(0, len(text), PIECE_CHARACTERS):
            piece = len(tokenizer.encode(text[at : at + PIECE_CHARACTERS]))
            count += max(piece - PIECE_SLACK_TOKENS, 0)
            if count > most:
                raise PromptTooLong(
                    f"{param} has more than {most} tokens, the most for {card.name}", param=param
                )


def check_ids(ids: list[int], param: str, card: ModelCard) -> list[int]:
    """Return the ids. Raises InvalidParameter: one is no token of the model, or the mask."""
    if ids and (min(ids) < 0 or max(ids) >= card.vocab_size):
        raise InvalidParameter(
            f"{param}: token ids must be from 0 to {card.vocab_size - 1}", param=param
        )
    if card.mask_token_id >= 0 and card.mask_token_id in ids:
        message = f"{param} has the mask token, {card.mask_token_id}, at token {ids.index(card.mask_token_id)}"
        raise InvalidParameter(f"{message}; it stands for what is not decoded yet", param=param)
    return ids


def _named(encode: Any, text: str, param: str, **options: Any) -> list[int]:
    try:
        ids: list[int] = encode(text, **options)
    except InvalidParameter as exc:
        raise InvalidParameter(exc.message, param=param) from exc
    return ids
