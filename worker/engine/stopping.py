"""After a commit: how far the answer is complete, whether it ends here, and which block is open. No
torch.
"""

from __future__ import annotations

from shared.algorithms import BLOCK, FULL
from worker.engine.request import Answer

# Rules whose published program closes an answer at its first end token, whatever is still masked
# before it.
CLOSES_AT_END = frozenset({"threshold", "factor"})


def advance(answer: Answer, *, block_done: bool | None = None) -> str:
    """Take note of what was committed; returns the text that may now be shown in addition.

    An answer ends at the first end token or stop string once everything before it is committed;
    what was committed after it is dropped, and no later block is started. At an end token,
    block-causal models finish the block first, as their programs do. Where committed tokens may
    still be edited, only finished blocks count.

    Args:
        block_done: whether the open block is finished; None: when nothing in it is masked.
    """
    if answer.regime == FULL and answer.params.diffusion.algorithm in CLOSES_AT_END:
        _close_after_end(answer)
    if block_done is None:
        block_done = not answer.masked()
    settled = answer.limit
    if answer.edits:
        settled = min(answer.window.stop if block_done else answer.window.start, answer.limit)
    canvas, ends = answer.canvas, answer.request.end_token_ids
    reason: str | None = None
    prefix = answer.prefix
    while prefix < settled and canvas[prefix] != answer.mask:
        if canvas[prefix] in ends and not _is_given(answer, prefix):
            reason = "stop" if block_done or answer.regime != BLOCK else None
            break
        prefix += 1
    grown, answer.prefix = prefix > answer.prefix, prefix
    if reason is None and answer.structure is not None:
        reason = answer.structure.ended  # complete, whether or not an end token says so
    if reason is None and prefix >= answer.limit and (block_done or answer.regime == FULL):
        reason = "length"  # the last block of the others is decoded whole, then cut
    most = answer.params.diffusion.max_forwards
    if reason is None and most is not None and answer.forwards >= most:
        reason = "length"
    shown = ""
    if grown or reason is not None:
        shown = answer.text.update(canvas[:prefix], final=reason is not None)
        if answer.text.stopped:
            reason = "stop"
            prefix = _tokens_of(answer, prefix)
    if reason is not None:
        answer.finish_reason, answer.end = reason, prefix
        answer.release()
    elif block_done:
        answer.open_block(answer.block + 1)
    return shown


def _close_after_end(answer: Answer) -> None:
    """Fill what follows a committed end token with it, as the model's training padded answers.

    Nothing behind it is computed any more, and what is still masked before it sees an answer that
    ends there: the early stop of dInfer's `generate_fastdllm`. With a cache it does so from a
    block's second forward on, as that program does. Under the other rules an end token, like a stop
    string, cuts an answer and changes nothing in it.
    """
    if answer.request.canvas is not None or not answer.request.end_token_ids:
        return
    if answer.params.diffusion.cache != "none" and answer.block_step < 2:
        return
    for position in answer.window:
        if answer.canvas[position] in answer.request.end_token_ids:
            end = answer.canvas[position]
            answer.canvas[position:] = [end] * (len(answer.canvas) - position)
            return


def _is_given(answer: Answer, position: int) -> bool:
    given = answer.request.canvas
    return given is not None and given[position] != answer.mask


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
