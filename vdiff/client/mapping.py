"""Bookkeeping of `map`: the next prompt, the outcome of each, and when to stop. No network here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sized

from vdiff.client.calls import new_key
from vdiff.client.errors import (
    AuthenticationFailed,
    ClientError,
    PermissionDenied,
    ServerUnreachable,
)
from vdiff.client.types import Job, Outcome, Prompt
from vdiff.progress import Bar

Progress = bool | Callable[[int, int, int | None], None]
"""True draws a bar; a function is called with (done, failed, total) after each end."""

HOPELESS = (
    AuthenticationFailed,
    PermissionDenied,
    ServerUnreachable,
)  # the next prompt would fare no better


class Ledger:
    """Hands out prompts and takes in their ends; any thread may ask.

    Args:
        idempotency_key: with it each prompt's key is KEY-INDEX, so that the same call in another
            process within 24 hours finds the jobs of the first; else a key is made for each prompt.
    """

    def __init__(
        self, prompts: Iterable[Prompt], *, idempotency_key: str | None, progress: Progress
    ) -> None:
        self._total = len(prompts) if isinstance(prompts, Sized) else None
        self._source: Iterator[tuple[int, Prompt]] = enumerate(prompts)
        self._key = idempotency_key
        self._outcomes: dict[int, Outcome] = {}
        self._failed = 0
        self._hopeless: ClientError | None = None
        self._lock = threading.Lock()
        self.stopped = False
        self._report = progress if callable(progress) else None
        self.bar = Bar("prompts", total=self._total, shown=progress is True)

    def useful(self, concurrency: int) -> int:
        """Return how many may work at once. Raises ClientError."""
        if concurrency < 1:
            raise ClientError("concurrency must be at least 1")
        return concurrency if self._total is None else min(concurrency, self._total)

    def next(self) -> tuple[int, Prompt, str] | None:
        """(index, prompt, idempotency key) of the next to submit; None when there is none."""
        with self._lock:
            while not self.stopped:
                if self._hopeless is not None and self._total is None:
                    return None  # a source without a length may have no end
                found = next(self._source, None)
                if found is None:
                    return None
                index, prompt = found
                if self._hopeless is None:
                    return index, prompt, new_key() if self._key is None else f"{self._key}-{index}"
                self._take(Outcome(index, prompt, None, self._hopeless))
            return None

    def took(self, index: int, prompt: Prompt, job: Job | None, error: ClientError | None) -> None:
        """The prompt has ended."""
        with self._lock:
            if isinstance(error, HOPELESS):
                self._hopeless = error
            self._take(Outcome(index, prompt, job, error))

    def _take(self, outcome: Outcome) -> None:
        self._outcomes[outcome.index] = outcome
        self._failed += not outcome.ok
        done = len(self._outcomes)
        self.bar.update(done, self._failed, self._total)
        if self._report is not None:
            self._report(done, self._failed, self._total)

    def ordered(self) -> list[Outcome]:
        return [self._outcomes[index] for index in sorted(self._outcomes)]
