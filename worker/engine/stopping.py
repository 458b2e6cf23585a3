"""After a commit: how far the answer is complete, whether it ends here, and which block is open. No torch."""

from __future__ import annotations

from worker.engine.request import Answer


def advance(answer: Answer, positions: list[int], mask: int) -> str:
    """Take note of committed positions; returns the text that may now be shown in addition.

    An answer ends at the first end token or stop string once everything before it is committed; what was committed after
    it is dropped, and no later block is started.
    """
    answer.committed += len(positions)
    canvas, ends = answer.canvas, answer.request.end_token_ids
    reason: str | None = None
    prefix = answer.prefix
    while prefix < len(canvas) and canvas[prefix] != mask:
        if canvas[prefix] in ends:
            reason = "stop"
            break
        prefix += 1
    grown, answer.prefix = prefix > answer.prefix, prefix
    if reason is None and prefix == len(canvas):
        reason = "length"
    shown = ""
    if grown or reason is not None:
        shown = answer.text.update(canvas[:prefix], final=reason is not None)
        if answer.text.stopped:
            reason = "stop"
            prefix = _tokens_of(answer, prefix)
    if reason is not None:
        answer.finish_reason, answer.end = reason, prefix
    elif prefix >= answer.block_starts[answer.block + 1]:
        answer.open_block(answer.block + 1)
    return shown


def _tokens_of(answer: Answer, prefix: int) -> int:
    """The fewest tokens whose text covers the text before the stop string."""
    wanted = len(answer.text.text)
    low, high = 0, prefix
    while low < high:
        middle = (low + high) // 2
        if len(answer.text.decode(answer.canvas[:middle])) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low
