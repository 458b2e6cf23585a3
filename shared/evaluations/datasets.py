"""Datasets: JSONL, one object a line, any columns. Read in a stream, checked line by line before
anything is accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.batches.lines import LineSplitter
from shared.errors import InvalidBody, InvalidParameter, InvalidRequest
from shared.evaluations.graders import Grader
from shared.evaluations.requests import Prompt, digest
from shared.evaluations.templates import MissingColumn
from shared.strict_json import parse_json
from shared.text_files import UTF8_MARK, require_utf8

MAX_ITEM_BYTES = 1024 * 1024


class BadDataset(InvalidRequest):
    """A line is wrong; the message says which."""

    code = "invalid_dataset"


@dataclass(frozen=True, slots=True)
class Item:
    number: int  # from 1
    line: int  # of the file
    key: str  # of its content, and which of its like it is
    cluster: str  # of its prompt
    data: dict[str, Any]


class DatasetReader:
    """Bytes in, items out, one at a time; the first bad line ends it.

    Of what it has read it holds the items' keys and the first row, so that its memory does not grow
    with the items.
    """

    def __init__(
        self, prompt: Prompt, graders: Sequence[Grader], max_items: int, limit: int | None
    ) -> None:
        self.keys: list[str] = []
        self.first: dict[str, Any] | None = None
        self._prompt = prompt
        self._graders = graders
        self._max_items = max_items
        self._limit = limit
        self._splitter = LineSplitter(MAX_ITEM_BYTES)
        self._seen: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        return self._limit is not None and len(self.keys) >= self._limit

    def feed(self, data: bytes) -> Iterator[Item]:
        """Yield the items whose lines end in `data`. Raises BadDataset, MissingColumn."""
        for number, raw in self._splitter.feed(data):
            yield from self._line(number, raw)

    def finish(self) -> Iterator[Item]:
        """Yield the item of the last line, if no newline ends it. Raises BadDataset, MissingColumn."""
        for number, raw in self._splitter.finish():
            yield from self._line(number, raw)
        if not self.keys:
            raise BadDataset("the dataset has no lines", param="dataset", code="empty_file")

    def _line(self, number: int, raw: bytes | None) -> Iterator[Item]:
        if self.full:
            return
        if raw is None:
            raise BadDataset(
                f"line {number} is longer than {MAX_ITEM_BYTES} bytes", param="dataset"
            )
        if number == 1:
            require_utf8(raw, "the dataset", param="dataset")
            raw = raw.removeprefix(UTF8_MARK)
        if not raw.strip():
            return
        if len(self.keys) >= self._max_items:
            message = f"a dataset takes at most {self._max_items} lines"
            raise BadDataset(message, param="dataset", code="too_many_lines")
        try:
            row = parse_json(raw)
        except InvalidBody as exc:
            message = exc.message.replace("the body", f"line {number}", 1)
            raise BadDataset(
                message if message != exc.message else f"line {number}: {message}", param="dataset"
            ) from exc
        if not isinstance(row, dict) or not row:
            raise BadDataset(f"line {number} must be an object with columns", param="dataset")
        yield self.add(row, number)

    def add(self, row: dict[str, Any], line: int) -> Item:
        """Check one row. Raises MissingColumn, BadDataset: with the line."""
        try:
            body = self._prompt.body(row)
            for grader in self._graders:
                if grader.reference is not None:
                    grader.reference.value(row)
        except MissingColumn as exc:
            raise MissingColumn(f"line {line}: {exc.message}", param=exc.param) from exc
        content = digest(row)[:40]
        self._seen[content] += 1
        key = f"{content}-{self._seen[content]}"
        self.keys.append(key)
        if self.first is None:
            self.first = row
        return Item(len(self.keys), line, key, digest(body)[:40], row)


def described(datasets: Mapping[str, Callable[[], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Every bundled dataset with its size and the columns that its first item has."""
    made = []
    for name, read in datasets.items():
        rows = read()
        made.append({"name": name, "items": len(rows), "columns": list(rows[0])})
    return made


def bundled_rows(datasets: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Raises InvalidParameter: no such dataset."""
    if name not in datasets:
        known = ", ".join(sorted(datasets)) or "none"
        raise InvalidParameter(
            f"dataset.bundled: there is no {name[:80]!r}; there are: {known}",
            param="dataset.bundled",
        )
    rows: list[dict[str, Any]] = datasets[name]()
    return rows
