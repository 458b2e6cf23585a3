"""Numbers of a query, as they come: text that anybody may have written."""

from __future__ import annotations

import pytest

from api.paging import page_limit, whole_number
from shared.errors import InvalidParameter


@pytest.mark.parametrize(
    "text",
    ["000000001999999", "", "-1", "+1", "1.0", " 1", "1 ", "0x1", "\u0663", "\xb2", "1" * 5000],
)
def test_what_is_no_number(text: str) -> None:
    assert whole_number(text) is None
    with pytest.raises(InvalidParameter) as wrong:
        page_limit(text, 20, 100)
    assert wrong.value.param == "limit"


def test_a_limit() -> None:
    assert [page_limit(value, 20, 100) for value in (None, "1", "007", "100")] == [20, 1, 7, 100]
    for beyond in ("0", "101", "999999999"):
        with pytest.raises(InvalidParameter):
            page_limit(beyond, 20, 100)
