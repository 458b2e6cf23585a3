"""Conversion of values to the text of JSON columns: keys in their order, characters as they are,
numbers exactly.
"""

from __future__ import annotations

import json
from typing import Any


def encode_json(value: Any) -> str:
    """Return the value as JSON text.

    Raises:
        TypeError, ValueError: it is not JSON (NaN, a set).
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
