"""Selection of the answers of the next step. Decides and computes nothing; no torch, so policy is
tested without a model.

order       priority (0 first), then arrival; a request's n answers are admitted one by one slots
at most max_num_seqs sequences run; the best of all, so that bulk work is set aside between two
steps when
            interactive work arrives, and goes on where it was when there is room again
memory      K/V of those that run, and of those set aside as long as it fits; what does not fit
moves to host memory rows        at most max_batched_tokens rows a step: prompts of block-causal
models are stored in pieces, and who found
            no room in this step is first in the next
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.engine.request import Answer, EngineRequest

GROW_STEPS = 64  # steps after which the batch may grow by one again, once memory ran out

Key = tuple[int, int]  # (priority, arrival)


@dataclass(slots=True)
class Entry:
    """An answer on the scheduler's books."""

    key: Key
    answer: Answer
    memory: int  # K/V positions that it needs
    last_step: int = -1
    resident: bool = False  # its K/V is on the device

    def __lt__(self, other: Entry) -> bool:
        return self.key < other.key


@dataclass(frozen=True, slots=True)
class Decision:
    """The answers of the next step, and those set aside or resumed for it."""

    run: list[tuple[Answer, int]]  # with the rows that each may compute
    swap_out: list[Answer] = field(default_factory=list)
    swap_in: list[Answer] = field(default_factory=list)
    set_aside: list[Answer] = field(default_factory=list)


class Scheduler:
    """Keeps the waiting, the running and those set aside.

    Args:
        memory: K/V positions that an answer needs.
        rows: rows of an answer's next forward.
        divisible: whether a forward may be cut into pieces of its prompt.
        greedy: whether an answer can use more rows than its next forward needs (scores: more draws
            at once).
    """

    def __init__(
        self,
        max_num_seqs: int,
        *,
        max_rows: int,
        max_memory: int,
        memory: Callable[[Answer], int],
        rows: Callable[[Answer], int],
        divisible: Callable[[Answer], bool],
        greedy: Callable[[Answer], bool] = lambda answer: False,
    ) -> None:
        self.max_num_seqs, self.max_rows, self.max_memory = max_num_seqs, max_rows, max_memory
        self._memory, self._rows, self._divisible, self._greedy = memory, rows, divisible, greedy
        self._waiting: list[Entry] = []  # a heap: new ones and those set aside
        self._running: list[Entry] = []
        self._arrivals = itertools.count()
        self._limit = max_num_seqs
        self._step = 0
        self._grow_at = 0
        self.preemptions = 0

    @property
    def running(self) -> list[Answer]:
        return [entry.answer for entry in self._running]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def memory_in_use(self) -> int:
        """K/V positions on the device."""
        return sum(e.memory for e in (*self._running, *self._waiting) if e.resident)

    def add(self, request: EngineRequest) -> None:
        for answer in request.sequences:
            key = (request.priority, next(self._arrivals))
            heapq.heappush(self._waiting, Entry(key, answer, self._memory(answer)))

    def schedule(self) -> Decision:
        """Choose who runs, who is set aside, whose K/V moves, and how many rows each gets."""
        self._step += 1
        if self._limit < self.max_num_seqs and self._step >= self._grow_at:
            self._limit, self._grow_at = self._limit + 1, self._step + GROW_STEPS
        before = set(map(id, self._running))
        self._choose()
        now = set(map(id, self._running))
        set_aside = [e for e in self._waiting if id(e) in before] if before - now else []
        self.preemptions += len(set_aside)
        swap_out = self._make_room()
        swap_in = [e for e in self._running if not e.resident]
        for entry in swap_in:
            entry.resident = True
        return Decision(
            self._share_rows(),
            [e.answer for e in swap_out],
            [e.answer for e in swap_in],
            [e.answer for e in set_aside],
        )

    def _choose(self) -> None:
        """The best of running and waiting, as many as slots and memory allow."""
        candidates = sorted(self._running)
        for _ in range(min(self._limit, len(self._waiting))):
            candidates.append(heapq.heappop(self._waiting))
        candidates.sort()
        chosen: list[Entry] = []
        used, blocked = 0, False
        for entry in candidates:
            # Behind one that finds no memory nobody new may pass, else a large request would wait
            # for ever.
            new = not entry.resident
            if (
                len(chosen) < self._limit
                and used + entry.memory <= self.max_memory
                and not (blocked and new)
            ):
                chosen.append(entry)
                used += entry.memory
            else:
                blocked = blocked or len(chosen) < self._limit
                heapq.heappush(self._waiting, entry)
        self._running = chosen

    def _make_room(self) -> list[Entry]:
        """Return the answers whose K/V must leave the device, the least urgent first."""
        used = sum(e.memory for e in self._running)
        out = []
        for entry in sorted(e for e in self._waiting if e.resident):
            if used + entry.memory <= self.max_memory:
                used += entry.memory
            else:
                entry.resident = False
                out.append(entry)
        return out

    def _share_rows(self) -> list[tuple[Answer, int]]:
        run: list[tuple[Answer, int]] = []
        left = self.max_rows
        for entry in sorted(self._running, key=lambda e: (e.key[0], e.last_step, e.key[1])):
            rows = self._rows(entry.answer)
            if rows > left and run and not (self._divisible(entry.answer) and left > 0):
                continue
            given = rows if rows <= left or not self._divisible(entry.answer) else left
            if self._greedy(entry.answer):
                given = max(rows, left // max(len(self._running) - len(run), 1))
            run.append((entry.answer, max(given, 1)))
            left -= given
            entry.last_step = self._step
        return run

    def shrink(self, failed: int) -> None:
        """Memory ran out with `failed` sequences in a step: go on with half as many, and grow
        slowly again.
        """
        self._limit = max(1, failed // 2)
        self._grow_at = self._step + GROW_STEPS

    def remove(self, request: EngineRequest) -> None:
        """Forget all answers of a request, running or waiting."""
        self._running = [e for e in self._running if e.answer.request is not request]
        kept = [e for e in self._waiting if e.answer.request is not request]
        if len(kept) != len(self._waiting):
            heapq.heapify(kept)
            self._waiting = kept

    def finish(self, answer: Answer) -> None:
        """Free the slot and the memory of one answer."""
        self._running = [e for e in self._running if e.answer is not answer]
        if any(
            e.answer is answer for e in self._waiting
        ):  # set aside in the very step that ended it
            self._waiting = [e for e in self._waiting if e.answer is not answer]
            heapq.heapify(self._waiting)
