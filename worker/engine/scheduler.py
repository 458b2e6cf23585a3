"""Who joins the next step. Decides, computes nothing; no torch, so policy is tested without a model.

First come, first served within a priority (0 first). A request's n answers are admitted one by one. What runs, runs on
to its end; a request that leaves frees its slot before the next step.
"""

from __future__ import annotations

import heapq
import itertools

from worker.engine.request import Answer, EngineRequest


class Scheduler:
    """Waiting answers by (priority, arrival) and the running ones, at most `max_num_seqs`."""

    def __init__(self, max_num_seqs: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.running: list[Answer] = []
        self._waiting: list[tuple[int, int, Answer]] = []
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: EngineRequest) -> None:
        for answer in request.sequences:
            heapq.heappush(self._waiting, (request.priority, next(self._arrivals), answer))

    def schedule(self) -> list[Answer]:
        """Fill the free slots and return what takes part in the next step."""
        while self._waiting and len(self.running) < self.max_num_seqs:
            self.running.append(heapq.heappop(self._waiting)[2])
        return list(self.running)

    def remove(self, request: EngineRequest) -> None:
        """Forget all answers of a request, running or waiting."""
        self.running = [a for a in self.running if a.request is not request]
        kept = [entry for entry in self._waiting if entry[2].request is not request]
        if len(kept) != len(self._waiting):
            heapq.heapify(kept)
            self._waiting = kept

    def finish(self, answer: Answer) -> None:
        """Free the slot of one answer."""
        self.running = [a for a in self.running if a is not answer]
