"""Watches an engine from inside its step loop: canvases, slots and memory after every single step,
not at a round's end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shared.algorithms import FULL
from worker.engine import StepEvent, VDiffEngine
from worker.engine.request import Answer

Key = tuple[str, int]  # request and answer
MOST = 20  # complaints that are kept


class Watch:
    """The events of a round, the canvases that must agree with them, and the scheduler's books."""

    def __init__(self, engine: VDiffEngine) -> None:
        self.engine, self.mask = engine, engine.card.mask_token_id
        self.broken, self.steps = list[str](), 0
        self._announced: dict[Key, dict[int, int]] = {}  # in the running step
        self._said: dict[Key, dict[int, int]] = {}  # ever: the last word on each position
        self._lock, self._stepping = threading.Lock(), threading.Lock()

    def complain(self, what: str) -> None:
        if len(self.broken) < MOST:
            self.broken.append(what)

    def listen(self, event: StepEvent) -> None:
        with self._lock:
            key = (event.request_id, event.index)
            fresh = dict(zip(event.positions, event.token_ids, strict=True))
            self._announced.setdefault(key, {}).update(fresh)
            self._said.setdefault(key, {}).update(fresh)
            if self.mask in fresh.values():
                self.complain(f"{key}: a mask was committed")

    def said(self, key: Key, count: int) -> list[int | None]:
        """The answer's first tokens as its events told them."""
        with self._lock:
            told = self._said.get(key, {})
            return [told.get(position) for position in range(count)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand around every step that the engine makes meanwhile."""
        step = self.engine._step
        self.engine._step = self._around(step)  # type: ignore[method-assign]
        try:
            yield
        finally:
            with self._stepping:  # the step that ended the last request is looked at, too
                del self.engine._step  # the method of the class is there again

    def _around(self, step: Callable[[Any], None]) -> Callable[[Any], None]:
        def watched(decision: Any) -> None:
            with self._stepping:
                look(decision)

        def look(decision: Any) -> None:
            with self.engine._changed:
                answers = [
                    a for handle in self.engine._handles.values() for a in handle.request.sequences
                ]
            before = [(a, list(a.canvas), list(a.prompt), a.window) for a in answers]
            running = {id(a) for a, _ in decision.run}
            with self._lock:
                self._announced.clear()
            step(decision)
            self.steps += 1
            for answer, canvas, prompt, window in before:
                self._canvas(answer, canvas, window, id(answer) in running)
                if answer.prompt != prompt:
                    self.complain(f"{answer.request.request_id}: the prompt changed")
            self._books()

        return watched

    def _canvas(self, answer: Answer, before: list[int], window: range, ran: bool) -> None:
        """Only what was announced has changed, inside the open block, and what was committed has
        not.
        """
        key = (answer.request.request_id, answer.index)
        with self._lock:
            announced = dict(self._announced.get(key, {}))
        if announced and not ran:
            self.complain(f"{key}: an event without a part in the step")
        if len(answer.canvas) != len(before):
            self.complain(f"{key}: the canvas has another length")
        ends, closed = answer.request.end_token_ids, False
        closes = answer.regime == FULL and answer.params.diffusion.algorithm in (
            "threshold",
            "factor",
        )
        for position, (old, new) in enumerate(zip(before, answer.canvas, strict=False)):
            # Under the rules that close an answer at its end token, everything behind one is that
            # token.
            filled = closed and new in ends
            closed = closed or (closes and new in ends)
            if filled:
                continue
            told = announced.get(position)
            if told is not None and (new != told or position not in window):
                self.complain(
                    f"{key}: position {position} was announced as {told} in {window} and is {new}"
                )
            if old != self.mask and told is not None and not answer.edits:
                self.complain(f"{key}: position {position} was committed twice")
            if told is None and new != old:
                self.complain(f"{key}: position {position} went from {old} to {new} without a word")

    def _books(self) -> None:
        """Slots and memory belong to answers that are not finished, and to nobody else."""
        scheduler = self.engine._scheduler
        with self.engine._changed:
            entries = [*scheduler._running, *scheduler._waiting]
            sequences = [
                a for handle in self.engine._handles.values() for a in handle.request.sequences
            ]
            if len(scheduler.running) > scheduler.max_num_seqs:
                self.complain(f"{len(scheduler.running)} run in {scheduler.max_num_seqs} slots")
            if scheduler.memory_in_use > scheduler.max_memory:
                self.complain(
                    f"{scheduler.memory_in_use} positions of K/V; there are {scheduler.max_memory}"
                )
            if {id(e.answer) for e in entries} != {
                id(a) for a in sequences if a.finish_reason is None
            }:
                self.complain("the scheduler's books are not the unfinished answers")
            for entry in entries:
                held = sum(cache.capacity for cache in entry.answer.caches)
                if held > entry.memory:
                    self.complain(
                        f"{entry.answer.request.request_id}: holds {held} positions, not {entry.memory}"
                    )
        for answer in sequences:
            if answer.finish_reason is not None and (answer.all_caches or answer.memory):
                self.complain(f"{answer.request.request_id}: finished, and still holds K/V")
