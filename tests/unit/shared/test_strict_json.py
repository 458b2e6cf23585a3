"""Strict JSON: the cost and the path of a refusal for characters that cannot be stored."""

from __future__ import annotations

import tracemalloc

import pytest

from shared.errors import InvalidBody
from shared.strict_json import parse_json


def test_a_long_key_does_not_cost_its_length_for_each_value_below_it() -> None:
    values = ", ".join([r'"\u0000"', *['"a"'] * 2_000])  # the check reads the first value last
    raw = f'{{"{"k" * 20_000}": [{values}]}}'
    tracemalloc.start()
    try:
        with pytest.raises(InvalidBody) as refused:
            parse_json(raw.encode())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.param == "k" * 80 + "[0]"
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (r'"\u0000"', "body"),
        (r'{"a\u0000": 1}', "body"),
        (r'{"a": {"b\ud800": 1}}', "a"),
        (r'{"messages": [{"content": "x"}, {"content": "\ud800"}]}', "messages[1].content"),
        (r'["x", "\u0000"]', "[1]"),
    ],
)
def test_the_path_of_a_bad_string(raw: str, param: str) -> None:
    with pytest.raises(InvalidBody) as refused:
        parse_json(raw.encode())
    assert refused.value.param == param
