"""Bounds on JSON bodies, checked on the bytes, before any object is made."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import json_bounds, strict_json
from shared.errors import InvalidBody, PromptTooLong
from shared.jobs.requests import parse
from shared.jobs.responses import CHAT
from shared.json_bounds import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, check_bounds
from shared.model_card import ModelCard
from shared.prompt_ids import PIECE_CHARACTERS, count_characters, message_ids, prompt_ids
from shared.tokenizer import TokenizerWrapper
from vdiff import bundled

TWO_MB = 2_000_000
HOSTILE = {
    "empty lists": b"[" + b"[]," * 600_000 + b"1]",
    "empty objects": b"[" + b"{}," * 600_000 + b"1]",
    "small objects": b"[" + b'{"a":1},' * 250_000 + b"1]",
    "one list of numbers": b"[" + b"1," * 1_000_000 + b"1]",
    "one list of strings": b"[" + b'"",' * 600_000 + b"1]",
    "levels": b"[" * TWO_MB,
    "levels of objects": b'{"a":' * 400_000,
    "levels, closed": b"[" * 1_000_000 + b"]" * 1_000_000,
    "a string that does not end, among levels": b"[" * 101 + b'"' + b'\\"' * 900_000,
    "quotes": b"[" * 101 + b'"' * TWO_MB,
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_refused_before_anything_is_made_of_it(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count ends at the bound: it looks at no more pieces than the bound has, however long the
    text is.
    """
    looked = 0
    tokens = json_bounds._tokens

    def counted(text: bytes) -> Any:
        nonlocal looked
        for token in tokens(text):
            looked += 1
            yield token

    monkeypatch.setattr(json_bounds, "_tokens", counted)
    monkeypatch.setattr(strict_json.json, "loads", lambda *a, **k: pytest.fail("it was parsed"))
    with pytest.raises(InvalidBody) as wrong:
        strict_json.parse_json(raw)
    assert wrong.value.param == "body"
    assert "at most" in wrong.value.message
    assert looked <= 4 * MAX_CONTAINERS  # two brackets, what is between them, and a comma


@pytest.mark.parametrize(
    "value",
    [
        [[1]] * (MAX_CONTAINERS - 1),
        list(range(MAX_VALUES - 2)),
        "[" * 1_000_000,
        "," * 1_000_000,
        '\\"[' * 100_000,
        [["[{,\\"] * 1000] * 200,
        {"messages": [{"role": "user", "content": "a, [b]"}] * 1000},
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_within_the_bounds_is_read(value: Any) -> None:
    assert strict_json.parse_json(json.dumps(value).encode()) == value


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def test_the_bounds_are_exact() -> None:
    check_bounds(nested(MAX_DEPTH))
    check_bounds(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]")
    for beyond in (nested(MAX_DEPTH + 1), b"[" + b"[]," * (MAX_CONTAINERS - 1) + b"[]]"):
        with pytest.raises(InvalidBody):
            check_bounds(beyond)


@given(
    st.recursive(
        st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_brackets_in_strings_do_not_count(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bounds, "MAX_DEPTH", 0)
        patch.setattr(json_bounds, "MAX_CONTAINERS", 0)
        text = json.dumps(str(value)).encode()
        check_bounds(text)  # one string: nothing in it is a container
        patch.setattr(json_bounds, "MAX_VALUES", 0)
        check_bounds(text)


@pytest.mark.parametrize(
    "raw", [b"{", b'{"a" 1}', b"[1,]", b"nul", b'"\\x"', b"9" * 5000, b"-" + b"9" * 5000]
)
def test_a_syntax_error_is_told_without_pythons_words(raw: bytes) -> None:
    with pytest.raises(InvalidBody) as wrong:
        strict_json.parse_json(raw)
    for word in ("Expecting", "sys.", "char ", "delimiter", "Exceeds"):
        assert word not in wrong.value.message


def test_text_far_beyond_the_context_is_never_encoded_as_a_whole() -> None:
    """The tokenizer sees pieces, and no more of them than the context has room for."""
    tokenizer = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
    card = ModelCard(
        name="m",
        family="llada",
        context_length=64,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=1,
        end_token_ids=(2,),
        suppress_token_ids={},
        capabilities={},
    )
    seen: list[int] = []

    class Counting:
        def encode(self, text: str, **options: Any) -> list[int]:
            seen.append(len(text))
            return tokenizer.encode(text, **options)

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            return "".join(m.get("reasoning", "") + m["content"] for m in messages)

    long = "seven words " * 160_000
    for encode in (
        lambda: prompt_ids(long, "prompt", card, Counting()),  # type: ignore[arg-type]
        lambda: message_ids([{"content": long}], "messages", card, Counting()),  # type: ignore[arg-type]
        lambda: message_ids([{"content": "", "reasoning": long}], "messages", card, Counting()),  # type: ignore[arg-type]
    ):
        with pytest.raises(PromptTooLong):
            encode()
    assert seen == [PIECE_CHARACTERS] * 3


def test_every_string_of_a_message_counts_once() -> None:
    one = {
        "role": "assistant",
        "content": "ab",
        "name": "c",
        "reasoning": "defg",
        "reasoning_content": "defg",
    }
    assert count_characters([one]) == len("assistant") + 7
    messages = [
        {"role": "assistant", "content": "", "reasoning": "x" * 30_000},
        {"role": "user", "content": "y"},
    ]
    assert parse(CHAT, {"model": "m", "messages": messages}, streaming=True).characters > 30_000
