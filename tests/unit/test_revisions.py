"""Migrations are one chain, numbered as their files are: two branches that took the same number are noticed here."""

from __future__ import annotations

import re
from pathlib import Path

VERSIONS = Path(__file__).resolve().parents[2] / "migrations" / "versions"


def test_one_chain_in_the_order_of_the_file_names() -> None:
    found = []
    for file in sorted(VERSIONS.glob("[0-9]*.py")):
        text = file.read_text(encoding="utf-8")
        pair = [
            re.search(rf'^{name} = (?:"(\d+)"|None)$', text, re.MULTILINE) for name in ("revision", "down_revision")
        ]
        assert all(pair), file.name
        found.append((file.name[:4], *(match.group(1) for match in pair if match)))
    numbers = [f"{number:04}" for number in range(1, len(found) + 1)]
    assert found == [(n, n, None if n == "0001" else f"{int(n) - 1:04}") for n in numbers]
