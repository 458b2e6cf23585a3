"""A dataset is read a piece at a time, and what is held of it does not grow with its items."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from shared.evaluations.datasets import BadDataset, DatasetReader
from shared.evaluations.requests import parse_prompt
from shared.jobs.responses import CHAT

PROMPT = parse_prompt("{{input}}", CHAT)


def reader(*, max_items: int = 10_000, limit: int | None = None) -> DatasetReader:
    return DatasetReader(PROMPT, [], max_items, limit)


def test_items_come_as_their_lines_end() -> None:
    one = reader()
    items = [
        item
        for piece in (b'{"input": "a"}\n{"in', b'put": "b"}\n\n{"input"', b': "a"}')
        for item in one.feed(piece)
    ]
    items += one.finish()
    assert [(item.number, item.line, item.data) for item in items] == [
        (1, 1, {"input": "a"}),
        (2, 2, {"input": "b"}),
        (3, 4, {"input": "a"}),
    ]
    assert one.first == {"input": "a"} and one.keys == [item.key for item in items]
    assert len(set(one.keys)) == 3 and items[0].cluster == items[2].cluster


def test_a_limit_ends_the_reading_and_a_bound_refuses() -> None:
    lines = b'{"input": "a"}\n' * 5
    limited = reader(limit=2)
    assert len(list(limited.feed(lines))) == 2 and limited.full
    with pytest.raises(BadDataset, match="at most 4 lines"):
        list(reader(max_items=4).feed(lines))


def test_memory_does_not_grow_with_the_items() -> None:
    """A row of many small values is 22 times as large in memory as in the file; 4 MB of them are
    read here.
    """
    line = json.dumps({"input": "x", "list": [[] for _ in range(3000)]}).encode() + b"\n"
    one = reader()
    tracemalloc.start()
    for _ in range(4_000_000 // len(line)):
        for _item in one.feed(line):
            pass
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(one.keys) > 300
    assert held < 1_000_000
