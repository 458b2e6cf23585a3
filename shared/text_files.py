"""Read text that people made with their own tools: UTF-8, with or without a byte order mark.

UTF-16 and UTF-32 are refused by name: Windows' tools write them, and their bytes would otherwise be
called bad UTF-8, or bad JSON. Every command and route that reads prompts, lines or datasets uses
this.
"""

from __future__ import annotations

from shared.errors import InvalidRequest

UTF8_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 4
# UTF-32 first: its little-endian mark begins as that of UTF-16.
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class NotUTF8(InvalidRequest):
    """Text in another encoding; the message names it."""

    code = "invalid_utf8"


def other_encoding(head: bytes) -> str | None:
    """Return the encoding that the first bytes of a text show, if it is not UTF-8."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    first = head[:HEAD_BYTES]
    if (
        len(first) >= 2 and 0 in first and any(first)
    ):  # ASCII without a mark: every second byte, or three of four, are 0
        zeros = [i for i, byte in enumerate(first) if byte == 0]
        if zeros in ([1], [1, 3]) or zeros in ([0], [0, 2]):
            return "UTF-16"
        if zeros in ([1, 2, 3], [0, 1, 2]):
            return "UTF-32"
    return None


def require_utf8(head: bytes, what: str, *, param: str | None = None) -> None:
    """Look at the first bytes of a text. Raises NotUTF8."""
    if (name := other_encoding(head)) is not None:
        raise NotUTF8(f"{what} is {name}; save it as UTF-8", param=param)


def decode_text(raw: bytes, what: str, *, param: str | None = None) -> str:
    """Return the text without its byte order mark.

    Args:
        what: names the text in errors: a file, a line, the body.

    Raises:
        NotUTF8: it is UTF-16 or UTF-32, or has bytes that are not UTF-8; with the line.
    """
    require_utf8(raw, what, param=param)
    try:
        return raw.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as exc:
        start = exc.start + (len(UTF8_MARK) if raw.startswith(UTF8_MARK) else 0)
        line = raw.count(b"\n", 0, start) + 1
        where = f", line {line}" if b"\n" in raw else ""
        raise NotUTF8(f"{what}{where} is not UTF-8 at byte {start}", param=param) from exc
