"""The migrations are one line: two that were made side by side under one number are noticed here,
before they land.
"""

from __future__ import annotations

import re
from pathlib import Path

from migrations import run

FOLDER = Path(run.__file__).parent / "versions"


def test_one_line_from_nothing_to_the_head() -> None:
    files = sorted(FOLDER.glob("0*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    revisions = [re.findall(r'^revision = "(\w+)"', text, re.MULTILINE)[0] for text in texts]
    before = [
        re.findall(r'^down_revision = (?:"(\w+)"|None)', text, re.MULTILINE)[0] for text in texts
    ]
    assert len(files) > 5 and [path.name[:4] for path in files] == revisions
    assert before == ["", *revisions[:-1]]
    assert run.head_revision() == revisions[-1]
