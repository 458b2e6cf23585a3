"""Migrations are one line: each has a number of its own and follows the one before it. Two branches
may each add the next.
"""

from __future__ import annotations

import re
from pathlib import Path

VERSIONS = Path(__file__).resolve().parents[2] / "migrations" / "versions"


def test_each_revision_follows_the_one_before() -> None:
    found = []
    for file in sorted(VERSIONS.glob("[0-9]*.py")):
        text = file.read_text(encoding="utf-8")
        own, before = (
            re.search(rf"^{name} = (.+)$", text, re.MULTILINE)
            for name in ("revision", "down_revision")
        )
        assert own is not None and before is not None, file.name
        found.append((file.name[:4], own.group(1).strip('"'), before.group(1).strip('"')))
    numbers = [f"{n:04}" for n in range(1, len(found) + 1)]
    assert found == list(zip(numbers, numbers, ["None", *numbers[:-1]], strict=True))
