"""Bytes of single tokens: exact for pieces of characters, in byte-level BPE and in vocabularies
with byte fallback.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from shared.token_bytes import offsets, spell
from shared.tokenizer import TokenizerWrapper
from vdiff import bundled
from worker.engine.outputs import TokenLogprob
from worker.work import logprobs_of

TINY = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))


def byte_fallback() -> TokenizerWrapper:
    vocab = {
        "<unk>": 0,
        "\u2581a": 1,
        "b": 2,
        "\u2581": 3,
        **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
    }
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    whole = json.loads(made.to_str())
    return TokenizerWrapper({"tokenizer.json": json.dumps(whole)})


FALLBACK = byte_fallback()


def text_slices(places: list[int], text: str) -> list[str]:
    return [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]


@given(st.text(min_size=1))
def test_the_tokens_bytes_are_the_texts(text: str) -> None:
    ids = TINY.encode(text, parse_special=False)
    pieces = [TINY.token_bytes.of(token) for token in ids]
    assert b"".join(pieces) == text.encode() == TINY.decode(ids).encode()
    places = offsets(pieces, text)
    assert "".join(text_slices(places, text)) == text
    for raw, part in zip(pieces, text_slices(places, text), strict=True):
        if spell(raw) == part:
            continue  # a whole text
        assert b"\x00" in raw or "\ufffd" in raw.decode("utf-8", "replace")  # shown by its bytes


def test_every_token_that_reads_as_text_has_that_text() -> None:
    for token in range(TINY.vocab_size):
        text = TINY.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            assert TINY.token_bytes.of(token).decode() == text


def test_byte_fallback() -> None:
    ids = [1, 4 + 0xE6, 4 + 0x97, 4 + 0xA5, 2, 3, 2]
    pieces = [FALLBACK.token_bytes.of(token) for token in ids]
    assert pieces == [b" a", b"\xe6", b"\x97", b"\xa5", b"b", b" ", b"b"]
    text = FALLBACK.decode(ids)
    assert text == "a\u65e5b b"  # the decoder drops the space in front
    assert text_slices(offsets(pieces, text), text) == ["a", "", "", "\u65e5", "b", " ", "b"]


def test_how_a_token_is_spelled() -> None:
    assert [
        spell(raw) for raw in (b" a", "\ufffd".encode(), b"\xf0\x9f", b"\x00", b"a\xe2", b"")
    ] == [
        " a",
        "\ufffd",
        r"bytes:\xf0\x9f",
        r"bytes:\x00",
        r"bytes:\x61\xe2",
        "",
    ]


@pytest.mark.parametrize("specials", [False, True])
def test_log_probabilities_of_a_character_in_pieces(specials: bool) -> None:
    ids = TINY.encode("é🙂 x")
    special = sorted(TINY.token_bytes.special)[0]
    ids = [ids[0], special, *ids[1:]]
    text = TINY.decode(ids, skip_special_tokens=not specials)
    alternatives = tuple((token, -1.0) for token in ids)
    told: list[dict[str, Any]] = logprobs_of(
        [TokenLogprob(token, -0.5, alternatives) for token in ids], TINY, text, specials=specials
    )
    kept = [t["bytes"] for t, token in zip(told, ids, strict=True) if specials or token != special]
    if not specials:
        assert bytes(byte for raw in kept for byte in raw).decode() == text
        assert "".join(text_slices([t["offset"] for t in told], text)) == text
    names = [name for name, _, _ in told[0]["top"]]
    assert len(set(names)) == len({tuple(raw) for _, raw, _ in told[0]["top"]}) == len(set(ids))
    assert not any("\ufffd" in name for name in names)
    assert all(t["bytes"] for t in told)
