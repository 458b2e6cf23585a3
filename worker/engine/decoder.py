"""The interface of a decoder: what a step asks of the model, and what it makes of the result.

`DiffusionSampler` (masked models, every rule), `APDDecoder` (left to right with a verifier) and
`RenoiseDecoder` (DiffusionGemma) are decoders. The engine plans all answers of a step, makes one
forward of the plans, and hands each decoder its part, so that requests of different rules share
forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.errors import EngineError, OutOfMemory, VDiffError
from worker.engine.batch import Pass
from worker.engine.outputs import TokenLogprob
from worker.engine.request import Answer


@dataclass(frozen=True, slots=True)
class Commit:
    """The changes of one step to one answer. `error` set: the answer cannot go on."""

    answer: Answer
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    provisional: dict[str, Any] | None = None
    block_done: bool | None = None  # None: when nothing in the block is masked
    error: VDiffError | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One answer's passes of a step and the positions (from the answer's start) whose logits they
    give.
    """

    answer: Answer
    passes: list[Pass]
    wanted: list[int]
    prefill: bool = False  # stores a part of the prompt's K/V, and gives no logits
    # stores the K/V of what stands before the open block, and gives that block's first token
    seed: bool = False


class Rows(Protocol):
    """The logits of a pass's wanted rows, [wanted, vocab] float32: a tensor, or what becomes one
    where it is sliced.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


Logits = Tensor | Rows


class Model(Protocol):
    """A model that computes passes and makes the caches that they read."""

    def compute(self, passes: Sequence[Pass]) -> Iterator[Logits]: ...
    def new_cache(self, capacity: int) -> Any: ...


class Decoder(Protocol):
    """One way of decoding: plan an answer's next forward, read its logits, commit."""

    def plan(self, answer: Answer, rows: int) -> Plan: ...
    def read(self, plan: Plan, parts: Sequence[Logits]) -> Any: ...
    def finish(self, plans: Sequence[Plan], reads: Sequence[Any]) -> list[Commit]: ...


def error_of(exc: BaseException) -> VDiffError:
    """Any failure of a step, as the error that its request ends with."""
    if isinstance(exc, VDiffError):
        return exc
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory(f"out of memory for one request alone: {exc}")
    return EngineError(f"{type(exc).__name__}: {exc}")


def guided(parts: Sequence[Logits], scale: float, rows: slice = slice(None)) -> Tensor:
    """Logits [wanted, vocab] of a pass, combined with those of its unconditional twin: u + (s +
    1)(c - u) (LLaDA).
    """
    conditional = parts[0][rows]
    if len(parts) == 1:
        return conditional
    unconditional = parts[1][rows]
    return unconditional + (scale + 1) * (conditional - unconditional)
