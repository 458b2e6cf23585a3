"""Ragged requests to tensors: rows of similar length share a padded batch, so that a long one does not slow short ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.request import Answer

# A group's shortest row has at least this share of its longest: padding costs at most as much again.
SHORTEST_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Rows:
    """One padded batch of a forward."""

    ids: Tensor  # [rows, length]
    lengths: Tensor | None  # [rows], None when nothing is padded
    take: Tensor  # [wanted, 2]: row and position of the hidden states that go through the head


def masked_positions(answer: Answer, mask: int) -> list[int]:
    """Positions of the open block still masked, counted from the answer's start."""
    return [p for p in answer.window if answer.canvas[p] == mask]


def group(lengths: list[int]) -> list[list[int]]:
    """Indices of rows, grouped by similar length."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[index] < SHORTEST_SHARE * longest:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def pack(rows: list[list[int]], wanted: list[list[int]], pad: int, device: torch.device) -> Rows:
    """Right-pad token rows. `wanted`: for each row the positions whose logits are asked for, in order."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    take = torch.tensor([(i, p) for i, positions in enumerate(wanted) for p in positions])
    ragged = bool((lengths != longest).any())
    return Rows(ids.to(device), lengths.to(device) if ragged else None, take.to(device))
