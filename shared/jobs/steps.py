"""Compact storage of the steps by which an answer came about. It can be read without the rest of
the job. Pure.

A worker notes what each step commits (`StepLog`) and stores `packed()` with the job's end;
`unpacked` is what the wire shows. Proposed tokens that no step committed are events only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from shared.errors import InvalidParameter

VERSION = 1
_SCALE = 1000  # confidences are kept in thousandths


class StepLog:
    """The commits of one attempt; forgets all of them once there are more than `limit`, as a part
    would be misleading.
    """

    def __init__(self, attempt: int, limit: int) -> None:
        self._attempt = attempt
        self._left = limit
        self._answers: dict[int, dict[str, Any]] = {}
        self._tokens: set[int] = set()

    def note(
        self,
        index: int,
        step: int,
        positions: Sequence[int],
        token_ids: Sequence[int],
        confidences: Sequence[float],
        tokens_total: int,
    ) -> None:
        cost = max(1, len(positions))  # a step that commits nothing takes room too
        if cost > self._left:
            self._left = -1
            self._answers.clear()
            self._tokens.clear()
            return
        self._left -= cost
        answer = self._answers.setdefault(
            index,
            {
                "index": index,
                "canvas": tokens_total,
                "steps": [],
                "positions": [],
                "tokens": [],
                "sure": [],
            },
        )
        # A block may reach beyond the answer's limit: the canvas is as long as what was committed
        # on it.
        answer["canvas"] = max(
            answer["canvas"], tokens_total, *(position + 1 for position in positions)
        )
        answer["total"] = tokens_total
        answer["steps"].append([step, len(positions)])
        answer["positions"].extend(positions)
        answer["tokens"].extend(token_ids)
        answer["sure"].extend(round(_SCALE * c) for c in confidences)
        self._tokens.update(token_ids)

    def packed(self, text: Callable[[int], str]) -> bytes | None:
        """None when nothing was noted, or too much."""
        if not self._answers:
            return None
        whole = {
            "version": VERSION,
            "attempt": self._attempt,
            "texts": {token: text(token) for token in sorted(self._tokens)},
            "answers": list(self._answers.values()),
        }
        return zlib.compress(
            json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
        )


def unpacked(kept: bytes) -> dict[str, Any]:
    """`{attempt, answers: [{index, canvas, tokens_total, steps: [{step, positions, tokens, texts,
    confidence}]}]}`.
    """
    whole = json.loads(zlib.decompress(kept))
    if whole["version"] != VERSION:
        raise InvalidParameter(
            f"the steps were kept in format {whole['version']}, which this version does not read"
        )
    texts: dict[str, str] = whole["texts"]
    answers = []
    for answer in whole["answers"]:
        steps, at = [], 0
        for step, count in answer["steps"]:
            tokens = answer["tokens"][at : at + count]
            steps.append(
                {
                    "step": step,
                    "positions": answer["positions"][at : at + count],
                    "tokens": tokens,
                    "texts": [texts[str(token)] for token in tokens],
                    "confidence": [sure / _SCALE for sure in answer["sure"][at : at + count]],
                }
            )
            at += count
        answers.append(
            {
                "index": answer["index"],
                "canvas": answer["canvas"],
                "tokens_total": answer["total"],
                "steps": steps,
            }
        )
    return {"attempt": whole["attempt"], "answers": answers}
