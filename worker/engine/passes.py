"""The model calls of one answer's step: which rows to compute, and which K/V they read.

    full attention   none      everything, every time: the yardstick
                     prefix    a block's first forward computes everything, later ones the block and
                               what follows it
                     dual      later ones compute the block alone, reading K/V on both sides
                               (Fast-dLLM, arXiv 2505.22618)
                     window    left to right: from kv_window positions before the previous forward's
                               first mask (APD, arXiv 2506.00413)
    block-causal     exact     what is not cached yet and the open block. The forward that opens a
                               block also stores the clean K/V of the block before it, so that
                               storing costs no forward of its own
                     none      everything up to the block's end

With logits shifted by one (Dream) the row before a block is computed again together with the block:
it predicts the block's first token, and a stale row would commit that token blindly. Guidance is a
second pass whose given tokens are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.algorithms import BLOCK, UNIFORM
from worker.engine.batch import Pass
from worker.engine.config import ModelConfig
from worker.engine.request import Answer


def twins(answer: Answer) -> int:
    """Sequences that one answer runs as: two with classifier-free guidance."""
    return 2 if answer.params.diffusion.cfg_scale > 0 else 1


def is_windowed(answer: Answer) -> bool:
    d = answer.params.diffusion
    return d.algorithm == "apd" or d.kv_window is not None or d.max_lookahead is not None


def is_verified(answer: Answer) -> bool:
    """Return whether APD's verifier has a share in the answer."""
    return (
        answer.params.diffusion.algorithm == "apd" and answer.params.diffusion.mixture_weight != 1
    )


def capacity(answer: Answer) -> int:
    """K/V positions that each of the answer's sequences needs; 0 without a cache."""
    if answer.params.diffusion.cache == "none" or answer.request.score is not None:
        return 0
    return len(answer.prompt) + len(answer.canvas)


def rows_needed(answer: Answer) -> int:
    """Rows of the answer's next forward, both twins, prompt included."""
    if answer.request.score is not None:
        return (len(answer.prompt) + len(answer.request.score.target)) * twins(answer)
    begin, end = len(answer.prompt) + answer.window.start, len(answer.prompt) + answer.window.stop
    cache, total = answer.params.diffusion.cache, len(answer.prompt) + len(answer.canvas)
    if is_windowed(answer):
        lookahead = answer.params.diffusion.max_lookahead
        first = 0 if answer.window_from is None else answer.window_from
        rows = (
            total
            if lookahead is None
            else min(total, len(answer.prompt) + answer.prefix + lookahead)
        ) - first
    elif answer.regime == BLOCK and (part := _fills_sub_block(answer)) is not None:
        rows = len(part)
    elif answer.regime in (BLOCK, UNIFORM):
        rows = end - (0 if cache == "none" else answer.cached)
    elif cache == "none" or answer.fresh:
        rows = total
    else:
        rows = (end if cache == "dual" else total) - begin
    return rows * twins(answer)


def is_divisible(answer: Answer) -> bool:
    """Return whether the answer's next step may be a part of its prompt only."""
    if answer.regime == UNIFORM:
        return len(answer.prompt) > answer.cached
    return answer.regime == BLOCK and answer.params.diffusion.cache != "none"


def _tokens(answer: Answer, twin: int) -> list[int]:
    if twin == 0:
        return answer.prompt + answer.canvas
    given = answer.request.canvas
    canvas = answer.canvas
    if given is not None:
        canvas = [
            answer.mask if given[i] != answer.mask else token for i, token in enumerate(canvas)
        ]
    return [answer.mask] * len(answer.prompt) + canvas


def _rows(answer: Answer, wanted: Sequence[int], first: int, shift: bool) -> list[int]:
    """Row of each wanted position (counted from the answer's start) in a pass that begins at
    `first`.
    """
    offset = len(answer.prompt) - first - shift
    return [max(p + offset, 0) for p in wanted]


def _block_begin(answer: Answer) -> int:
    """First position of the sequence that shares the open block (block-causal): the prompt's end
    may be in it.
    """
    length = answer.params.diffusion.block_length
    assert length is not None
    return (len(answer.prompt) + answer.window.start) // length * length


def ranked_row(answer: Answer) -> tuple[int, int] | None:
    """The row whose confidences the published program ranks: where the answer begins in it, and its
    length.

    Block-causal: the open block. Full attention without a cache: the whole sequence. With one the
    programs work in float64, where confidences are hardly ever equal.
    """
    if answer.regime == BLOCK:
        length = answer.params.diffusion.block_length
        assert length is not None
        return len(answer.prompt) - _block_begin(answer), length
    if answer.params.diffusion.cache == "none":
        return len(answer.prompt), len(answer.prompt) + len(answer.canvas)
    return None


def prefill(answer: Answer, facts: ModelConfig, rows: int) -> list[Pass]:
    """Store K/V of as many whole prompt blocks as fit into `rows`, when not all fit beside the open
    block; else nothing.
    """
    d = answer.params.diffusion
    if answer.regime != BLOCK or d.cache != "exact":
        return []
    length = d.block_length
    assert length is not None
    begin = _block_begin(answer)
    share = rows // twins(answer)
    if begin - answer.cached + length <= share:
        return []
    stop = min(begin, answer.cached + max(share // length, 1) * length)
    if stop <= answer.cached:
        return []
    return [
        Pass(
            _tokens(answer, twin)[answer.cached : stop],
            [],
            answer.cached,
            "block",
            length,
            answer.caches[twin],
            stop,
        )
        for twin in range(twins(answer))
    ]


def needs_seed(answer: Answer, facts: ModelConfig) -> bool:
    """Return whether a forward over what stands before the open block comes first
    (`ModelConfig.seeded`).
    """
    if not facts.seeded:
        return False
    stale = answer.params.diffusion.cache != "none" and answer.cached < _block_begin(answer)
    return stale or _wants_seed(answer)


def _wants_seed(answer: Answer) -> bool:
    begin, first = _block_begin(answer), answer.window.start
    return begin > 0 and begin == len(answer.prompt) + first and answer.canvas[first] == answer.mask


def seed_passes(answer: Answer, rows: int) -> tuple[list[Pass], list[int]]:
    """Store the K/V of what stands before the open block; the last row predicts that block's first
    token.

    Returns:
        The passes, and the position that their logits are of; none when the block's first token is
        known, or when not everything fits into `rows`.
    """
    d = answer.params.diffusion
    assert d.block_length is not None
    begin, cached = _block_begin(answer), d.cache != "none"
    first, stop = answer.cached if cached else 0, begin
    share = rows // twins(answer)
    if cached and stop - first > share:
        stop = min(begin, first + max(share // d.block_length, 1) * d.block_length)
    wanted = [answer.window.start] if stop == begin and _wants_seed(answer) else []
    made = []
    for twin in range(twins(answer)):
        cache = answer.caches[twin] if cached else None
        taken = [stop - first - 1] if wanted else []
        tokens = _tokens(answer, twin)[first:stop]
        made.append(
            Pass(tokens, taken, first, "block", d.block_length, cache, stop if cached else 0)
        )
    return made, wanted


def after_seed(answer: Answer, passes: Sequence[Pass]) -> None:
    """Note what a seed forward has stored."""
    if passes[0].cache is not None:
        answer.cached = passes[0].keys
    answer.prefill_forwards += 1


def candidates(answer: Answer) -> list[int]:
    """Return the masked positions that a step may commit: of the first sub-block with masks, or of
    the whole block.
    """
    masked = answer.masked()
    part = sub_block(answer)
    return masked if part is None else [p for p in masked if p in part]


def sub_block(answer: Answer) -> range | None:
    """Return the sub-block that is being filled, counted from the answer's start; None without
    sub-blocks.
    """
    length, masked = answer.params.diffusion.sub_block_length, answer.masked()
    if length is None or not masked:
        return None
    offset = _block_begin(answer) - len(answer.prompt)
    begin = offset + (masked[0] - offset) // length * length
    return range(begin, min(begin + length, answer.window.stop))


def _fills_sub_block(answer: Answer) -> range | None:
    """Return the sub-block whose rows alone the next forward computes, reading the block's kept K/V
    (cache `dual`).
    """
    part = sub_block(answer)
    if part is None or answer.params.diffusion.cache != "dual" or answer.fresh:
        return None
    known = part.start < 0 or answer.canvas[part.start] != answer.mask
    return part if known else None


def block_passes(answer: Answer, facts: ModelConfig, wanted: Sequence[int]) -> list[Pass]:
    """The forward of the open block.

    Args:
        wanted: positions whose logits are asked for, counted from the answer's start.
    """
    d = answer.params.diffusion
    begin, end = len(answer.prompt) + answer.window.start, len(answer.prompt) + answer.window.stop
    made = []
    for twin in range(twins(answer)):
        tokens = _tokens(answer, twin)
        total, first, stop = len(tokens), 0, len(tokens)
        attention, block, keys = "full", 0, total
        if answer.regime == BLOCK:
            assert d.block_length is not None
            attention, block, stop, keys = "block", d.block_length, end, end
            first = 0 if d.cache == "none" else answer.cached
            part = _fills_sub_block(answer)
            if part is not None:
                attention, first = "full", len(answer.prompt) + part.start
                stop = len(answer.prompt) + part.stop
        elif d.cache in ("prefix", "dual") and not answer.fresh:
            first = max(begin - facts.shift, 0)
            stop = end if d.cache == "dual" else total
        cache = None if d.cache == "none" else answer.caches[twin]
        rows = _rows(answer, wanted, first, facts.shift)
        made.append(
            Pass(
                tokens[first:stop],
                rows,
                first,
                attention,
                block,
                cache,
                0 if cache is None else keys,
            )
        )
    return made


def window_passes(answer: Answer, facts: ModelConfig, wanted: Sequence[int]) -> list[Pass]:
    """A forward of the left-to-right window: masks beyond max_lookahead are not in the input at
    all.
    """
    d = answer.params.diffusion
    made = []
    for twin in range(twins(answer)):
        tokens = _tokens(answer, twin)
        stop = len(tokens)
        if d.max_lookahead is not None:
            stop = min(stop, len(answer.prompt) + answer.prefix + d.max_lookahead)
        first, cache = 0, None
        if d.kv_window is not None:
            cache = answer.caches[twin]
            if answer.window_from is not None:
                first = max(0, answer.window_from - d.kv_window + 1)
        rows = _rows(answer, wanted, first, facts.shift)
        made.append(
            Pass(tokens[first:stop], rows, first, cache=cache, keys=0 if cache is None else stop)
        )
    return made


def lookahead(answer: Answer) -> list[int]:
    """Masked positions inside the window, from the first one on."""
    d = answer.params.diffusion
    stop = len(answer.canvas)
    if d.max_lookahead is not None:
        stop = min(stop, answer.prefix + d.max_lookahead)
    return [p for p in range(answer.prefix, stop) if answer.canvas[p] == answer.mask]


def after_forward(answer: Answer) -> None:
    """Note what the answer's forward has left in its caches."""
    if is_windowed(answer):
        answer.window_from = len(answer.prompt) + answer.prefix
    elif answer.regime == BLOCK:
        answer.cached = _block_begin(answer)
    if answer.fresh and answer.params.diffusion.cache in ("prefix", "dual"):
        answer.cache_refreshes += 1
    answer.fresh = False
    answer.forwards += 1


def after_prefill(answer: Answer, passes: Sequence[Pass]) -> None:
    answer.cached = passes[0].first + len(passes[0].ids)
    answer.prefill_forwards += 1
