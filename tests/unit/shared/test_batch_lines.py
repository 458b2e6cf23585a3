"""The lines of batch files: numbered however they are cut into pieces, and written so that any
client can split them.
"""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from shared.batches.lines import LineSplitter, output_line, parse_line
from shared.errors import InvalidBody, VDiffError

CHAT = "/v1/chat/completions"
GOOD = b'{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}\n'


def bad_lines(pieces: list[bytes]) -> dict[int, VDiffError]:
    splitter, bad = LineSplitter(), {}
    for piece in (*pieces, None):
        for number, raw in splitter.finish() if piece is None else splitter.feed(piece):
            try:
                parse_line(number, raw, CHAT)
            except VDiffError as exc:
                bad[number] = exc
    return bad


@pytest.mark.parametrize("size", [1 << 16, 999])
def test_a_bad_line_31417_is_told_by_its_number(size: int) -> None:
    whole = b"".join(GOOD % i if i != 31_417 else b'{"custom_id": \n' for i in range(1, 40_001))
    bad = bad_lines([whole[at : at + size] for at in range(0, len(whole), size)])
    assert list(bad) == [31_417]
    assert isinstance(bad[31_417], InvalidBody)


def test_a_line_of_ten_megabytes_is_not_kept() -> None:
    pieces = [GOOD % 1, b'{"custom_id": "', *[b"x" * (1 << 20)] * 10, b'"}\n', GOOD % 3]
    tracemalloc.start()
    bad = bad_lines(pieces)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {number: exc.code for number, exc in bad.items()} == {2: "line_too_long"}
    assert peak < 9 << 20  # of 10 MiB that went through, 4 may be one line


def test_a_line_out_stays_one_line_for_str_splitlines() -> None:
    text = "a\u2028b\u2029c\u0085d\x1ce"
    row: dict[str, Any] = {
        "id": "job_1",
        "custom_id": text,
        "status": "succeeded",
        "result": {"text": text},
        "error": None,
    }
    written = output_line(row).decode()
    assert len(written.splitlines()) == 1
    assert json.loads(written)["response"]["body"]["text"] == text
