"""The true bytes of single tokens, and how a token is shown that is no whole text. Pure.

Decoding one token alone gives U+FFFD for a piece of a multi-byte character. The vocabulary knows
better: byte-level BPE writes each byte as a character of its own, and tokenizers with byte fallback
have tokens such as `<0xE2>`.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for a space


def _byte_characters() -> dict[str, int]:
    """Return byte-level BPE's alphabet: 256 printable characters, and the byte that each stands for
    (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_characters()


class TokenBytes:
    """Bytes of the tokens of one `tokenizer.json`.

    Args:
        tokenizer_json: the file's content.
        piece: token id -> the vocabulary's own spelling, or None.
        decode: token id -> text, for decoders that are neither byte-level nor with byte fallback.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        piece: Callable[[int], str | None],
        decode: Callable[[int], str],
    ) -> None:
        whole = json.loads(tokenizer_json)
        added = whole.get("added_tokens") or ()
        self._added = {token["id"]: str(token["content"]) for token in added}
        self.special = frozenset(
            token["id"] for token in added if token.get("special")
        )  # what an answer's text leaves out
        kinds = list(_kinds(whole.get("decoder")))
        self._byte_level, self._fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._piece, self._decode = piece, decode

    def of(self, token_id: int) -> bytes:
        """Return the token's bytes; an id without a token has none."""
        piece = self._added.get(token_id) or self._piece(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            if all(character in _ALPHABET for character in piece):
                return bytes(_ALPHABET[character] for character in piece)
            return piece.encode(
                "utf-8", "replace"
            )  # an added token: the decoder leaves it as it is
        if self._fallback:
            found = _BYTE_TOKEN.fullmatch(piece)
            return (
                bytes([int(found[1], 16)])
                if found
                else piece.replace(_SPACE, " ").encode("utf-8", "replace")
            )
        return self._decode(token_id).encode("utf-8", "replace")


def _kinds(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, Mapping):
        yield str(decoder.get("type"))
        for inner in decoder.get("decoders") or ():
            yield from _kinds(inner)


def spell(raw: bytes) -> str:
    r"""Return a token as text: as it reads, or OpenAI's `bytes:\xf0\x9f` for one that is no text, or holds a NUL."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return spell_bytes(raw)
    return spell_bytes(raw) if "\x00" in text else text


def spell_bytes(raw: bytes) -> str:
    """Return the bytes by their numbers."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def offsets(pieces: Sequence[bytes], text: str) -> list[int]:
    """Return where each token begins in `text`, in characters.

    A token that begins inside a character has the place of that character, so that the slices
    between the places add up to the text. Places behind the end of a text that was cut, by a stop
    string for instance, are its end.

    Args:
        pieces: the tokens' bytes, empty for a token that the text leaves out.
    """
    decoder = getincrementaldecoder("utf-8")("replace")
    made, at, written = [], 0, []
    for raw in pieces:
        made.append(at)
        fresh = decoder.decode(raw)
        at += len(fresh)
        written.append(fresh)
    # SentencePiece's decoder drops the space in front of the first word.
    dropped = 1 if text and "".join(written).startswith(" ") and not text.startswith(" ") else 0
    return [min(max(place - dropped, 0), len(text)) for place in made]
