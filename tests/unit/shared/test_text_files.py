"""Text that other tools wrote: a byte order mark is no part of it, UTF-16 is refused by name,
everywhere alike.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.batches.lines import LineSplitter, parse_line
from shared.errors import VDiffError
from shared.evaluations.datasets import DatasetReader
from shared.evaluations.requests import Prompt
from shared.strict_json import parse_json
from shared.text_files import NotUTF8, decode_text, other_encoding
from vdiff.bench import read_set
from vdiff.cli.batch import endpoint_of
from vdiff.cli.connect import prompts_of, read_stdin
from vdiff.cli.evaluations import read_yaml
from worker.offline import _count

BODY = {
    "messages": [{"role": "user", "content": "Größe"}],
    "metadata": {"answer": "x"},
    "input": "Größe",
}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
TEXT = json.dumps(LINE | BODY, ensure_ascii=False) + "\n"


def read_batch(raw: bytes) -> Any:
    splitter = LineSplitter()
    text = json.dumps(LINE, ensure_ascii=False)
    raw = raw.replace(TEXT.strip().encode(), text.encode())
    ((number, line), *_) = [*splitter.feed(raw), *splitter.finish()]
    return parse_line(number, line, "/v1/chat/completions")


class Rows(DatasetReader):
    """A reader that keeps rows as they are, without a prompt that would need columns."""

    def add(self, row: dict[str, Any], line: int) -> Any:
        self.keys.append(str(line))
        return row


def read_dataset(raw: bytes) -> Any:
    reader = Rows(Prompt.__new__(Prompt), (), max_items=10, limit=None)
    return [*reader.feed(raw), *reader.finish()]


def from_file(
    read: Callable[[Path], Any], name: str = "prompts.jsonl"
) -> Callable[[bytes, Path], Any]:
    def run(raw: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(raw)
        return read(folder / name)

    return run


def from_stdin(read: Callable[[], Any]) -> Callable[[bytes, Path], Any]:
    def run(raw: bytes, folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
            return read()

    return run


READERS: dict[str, Callable[[bytes, Path], Any]] = {
    "body": lambda raw, _: parse_json(raw),
    "batch": lambda raw, _: read_batch(raw),
    "dataset": lambda raw, _: read_dataset(raw),
    "vdiff submit --file": from_file(prompts_of),
    "vdiff submit --file prompts.txt": from_file(prompts_of, "prompts.txt"),
    "vdiff submit --file -": from_stdin(lambda: prompts_of(Path("-"))),
    "vdiff submit -": from_stdin(read_stdin),
    "vdiff batch submit": from_file(endpoint_of),
    "vdiff eval run": from_file(read_yaml, "config.yaml"),
    "vdiff bench": from_file(lambda path: read_set(path, None)),
    "vdiff generate": from_file(_count),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    plain = READERS[name](TEXT.encode(), tmp_path)
    assert plain
    assert READERS[name](b"\xef\xbb\xbf" + TEXT.encode(), tmp_path) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", READERS)
def test_other_encodings_are_refused_by_name(name: str, encoding: str, tmp_path: Path) -> None:
    with pytest.raises(VDiffError, match=encoding[:6].upper()) as refused:
        READERS[name](TEXT.encode(encoding), tmp_path)
    assert "UTF-8" in refused.value.message and refused.value.code == "invalid_utf8"


def test_bytes_that_are_not_utf8_are_named_with_their_line() -> None:
    with pytest.raises(NotUTF8, match=r"^f.jsonl, line 2 is not UTF-8 at byte 4$"):
        decode_text(b"abc\n\xff", "f.jsonl")
    with pytest.raises(NotUTF8, match=r"^f.jsonl is not UTF-8 at byte 4$"):
        decode_text(b"\xef\xbb\xbfa\xff", "f.jsonl")


@pytest.mark.parametrize(
    "text", [b"", b"a", b"{}", b"\xef\xbb\xbf", "ÿþ".encode(), b"\x00", b"\x00\x00\x00\x00"]
)
def test_what_is_no_other_encoding(text: bytes) -> None:
    assert other_encoding(text) is None
