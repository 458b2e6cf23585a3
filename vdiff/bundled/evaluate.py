"""Score answers to an evaluation set: exact match per kind with Wilson's 95% interval.

vdiff generate --model vdiff/bundled/vdiff-tiny --input vdiff/bundled/vdiff-tiny/eval.jsonl --output
out.jsonl python -m vdiff.bundled.evaluate vdiff/bundled/vdiff-tiny/eval.jsonl out.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from shared.statistics import wilson


def score(questions: Path, answers: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Per kind (right, total), and the custom_ids that have no answer (they count as wrong).

    Raises:
        OSError: a file cannot be read.
        json.JSONDecodeError: a line is not JSON.
    """
    given = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given[row["custom_id"]] = row.get("text")
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    missing = []
    for line in questions.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        kind, wanted = question["metadata"]["kind"], question["metadata"]["answer"]
        text = given.get(question["custom_id"])
        if text is None:
            missing.append(question["custom_id"])
        right, total = counts[kind]
        counts[kind] = right + (text == wanted), total + 1
    return dict(counts), missing


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if len(args) != 2:
        print(
            "usage: python -m vdiff.bundled.evaluate QUESTIONS.jsonl ANSWERS.jsonl", file=sys.stderr
        )
        return 2
    counts, missing = score(Path(args[0]), Path(args[1]))
    print(f"{'kind':<12} {'right':>9}  exact match  95% interval")
    for kind, (right, total) in counts.items():
        low, high = wilson(right, total)
        print(f"{kind:<12} {right:>4}/{total:<4} {right / total:>11.1%}  {low:.1%} to {high:.1%}")
    if missing:
        print(f"no answer for {len(missing)} questions, the first is {missing[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
