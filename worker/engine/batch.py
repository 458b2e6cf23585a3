"""From what each sequence wants of a step to tensors: rows packed end to end, and attention in
units of one shape.

Everything but attention works on rows: the rows of all sequences stand behind one another, nothing
is padded. Attention is done in units. On CPU a unit holds sequences of exactly the same shape; on
accelerators, where a launch costs more than a little padding, also those of similar shape, padded
and masked; or, where a kernel takes sequences of any lengths (`varlen`), all that see every key are
one unit, without padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.engine.cache import KVCache

SIMILAR_SHARE = (
    0.75  # a unit's smallest sequence has at least this share of its largest, in rows and in keys
)


@dataclass(frozen=True, slots=True)
class Pass:
    """One sequence's part in one forward.

    Its rows are the tokens at positions first .. first + len(ids) - 1. Without a cache they attend
    to each other (then `first` is 0); with one they are written to it and attend to its positions 0
    .. keys - 1.
    """

    ids: list[int]
    wanted: list[int]  # rows (indices into ids) whose logits are asked for
    first: int = 0
    attention: str = "full"  # "full", "causal", or "block": causal between blocks, full inside one
    block: int = 0  # block length, tokens, of "block"
    cache: KVCache | None = None
    keys: int = 0

    @property
    def visible(self) -> int:
        """Keys that the last row sees at most."""
        return self.keys if self.cache is not None else len(self.ids)

    @property
    def masked(self) -> bool:
        """Return whether some row may not see all `visible` keys."""
        if self.attention == "full" or len(self.ids) <= 1:
            return False
        return (
            self.attention == "causal"
            or self.first // self.block != (self.first + len(self.ids) - 1) // self.block
        )


@dataclass(frozen=True, slots=True)
class Ragged:
    """The offsets of each sequence of a unit, as variable-length kernels take them."""

    row_ends: Tensor  # int32 [sequences + 1], from 0
    key_ends: Tensor  # int32 [sequences + 1], from 0
    rows: int  # of the longest
    keys: int

    @classmethod
    def of(cls, rows: Sequence[int], keys: Sequence[int], device: torch.device) -> Ragged:
        def ends(of: Sequence[int]) -> Tensor:
            return torch.tensor([0, *itertools.accumulate(of)], dtype=torch.int32, device=device)

        return cls(ends(rows), ends(keys), max(rows), max(keys))


@dataclass(frozen=True, slots=True)
class Unit:
    """Passes whose attention is one call: `rows` packed rows each, the same number or padded to it;
    or ragged.
    """

    begin: int  # first packed row
    passes: list[Pass]
    rows: int
    keys: int
    mask: (
        Tensor | None
    )  # bool, broadcastable to [sequences, heads, rows, keys]; True where a row may look
    gather: Tensor | None = None  # int64 [sequences * rows]: packed row of each padded one
    scatter: Tensor | None = None  # int64 [packed rows]: padded row of each packed one
    ragged: Ragged | None = None

    @property
    def end(self) -> int:
        return self.begin + sum(len(p.ids) for p in self.passes)

    @property
    def cached(self) -> bool:
        return self.passes[0].cache is not None


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole forward."""

    ids: Tensor  # int64 [rows]
    positions: Tensor  # int64 [rows]
    units: list[Unit]
    # int64 [wanted]: packed rows that go through the head, pass by pass in the order given
    take: Tensor
    counts: list[int] = field(default_factory=list)  # wanted rows of each pass


def _mask_of(p: Pass, keys: int, device: torch.device) -> Tensor:
    """bool [rows, keys]."""
    position = torch.arange(p.first, p.first + len(p.ids), device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    if p.attention == "causal":
        return (key <= position) & (key < p.visible)
    if p.attention == "block":
        return (key < (position // p.block + 1) * p.block) & (key < p.visible)
    return (key < p.visible).expand(len(p.ids), keys)


def _exact_groups(passes: Sequence[Pass]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, p in enumerate(passes):
        inside = (p.first, p.attention, p.block) if p.masked else ()
        groups.setdefault((len(p.ids), p.visible, p.cache is None, *inside), []).append(i)
    return list(groups.values())


def _similar_groups(passes: Sequence[Pass]) -> list[list[int]]:
    order = sorted(
        range(len(passes)),
        key=lambda i: (passes[i].cache is None, -len(passes[i].ids), -passes[i].visible),
    )
    groups: list[list[int]] = []
    for i in order:
        p = passes[i]
        if groups:
            head = passes[groups[-1][0]]
            largest = max(passes[j].visible for j in groups[-1])
            smallest = min(passes[j].visible for j in groups[-1])
            close = min(smallest, p.visible) >= SIMILAR_SHARE * max(largest, p.visible)
            if (
                (p.cache is None) == (head.cache is None)
                and close
                and len(p.ids) >= SIMILAR_SHARE * len(head.ids)
            ):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def _ragged_groups(passes: Sequence[Pass]) -> list[list[int]]:
    """All that see every key, with and without a cache; those that do not are left out."""
    seeing = [i for i, p in enumerate(passes) if not p.masked]
    groups = (
        [i for i in seeing if (passes[i].cache is None) is without] for without in (True, False)
    )
    return [group for group in groups if group]


def _ragged_unit(members: list[Pass], begin: int, device: torch.device) -> Unit:
    ragged = Ragged.of([len(p.ids) for p in members], [p.visible for p in members], device)
    return Unit(begin, members, ragged.rows, ragged.keys, None, ragged=ragged)


def _unit(members: list[Pass], begin: int, device: torch.device) -> Unit:
    rows, keys = max(len(p.ids) for p in members), max(p.visible for p in members)
    first = members[0]
    same = all((len(p.ids), p.visible) == (rows, keys) for p in members)
    alike = len({(p.first, p.attention, p.block) for p in members if p.masked}) <= 1
    if same and (alike and all(p.masked == first.masked for p in members)):
        mask = _mask_of(first, keys, device) if first.masked else None
        return Unit(begin, members, rows, keys, mask)
    mask = torch.zeros(len(members), 1, rows, keys, dtype=torch.bool, device=device)
    gather, scatter, at = [], [], begin
    for i, p in enumerate(members):
        n = len(p.ids)
        mask[i, 0, :n] = _mask_of(p, keys, device)
        mask[i, 0, n:, 0] = True  # a padded row must see something, else its softmax is NaN
        gather += [at + min(r, n - 1) for r in range(rows)]
        scatter += [i * rows + r for r in range(n)]
        at += n
    return Unit(
        begin,
        members,
        rows,
        keys,
        mask,
        torch.tensor(gather, device=device),
        torch.tensor(scatter, device=device),
    )


def arrange(
    passes: Sequence[Pass], device: torch.device, *, pad: bool, varlen: bool = False
) -> Layout:
    """Lay out a forward.

    Args:
        pad: whether sequences of similar shape share a unit by padding.
        varlen: whether those that see every key are one unit of any lengths.
    """
    ragged = _ragged_groups(passes) if varlen else []
    left = sorted(set(range(len(passes))) - {i for group in ragged for i in group})
    shaped = _similar_groups if pad else _exact_groups
    groups = [*ragged, *([left[j] for j in group] for group in shaped([passes[i] for i in left]))]
    units: list[Unit] = []
    begins = [0] * len(passes)
    ids: list[int] = []
    positions: list[int] = []
    for number, members in enumerate(groups):
        unit = _ragged_unit if number < len(ragged) else _unit
        units.append(unit([passes[i] for i in members], len(ids), device))
        for i in members:
            begins[i] = len(ids)
            ids += passes[i].ids
            positions += range(passes[i].first, passes[i].first + len(passes[i].ids))
    take = [begins[i] + row for i, p in enumerate(passes) for row in p.wanted]
    return Layout(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        units,
        torch.tensor(take, dtype=torch.int64, device=device),
        [len(p.wanted) for p in passes],
    )
