"""Limits on what a key may have queued at once. Only this module checks them, in the transaction
that queues.

Transactions that add to the same queue run one after the other, so that any number of requests and
processes stay within the limit together. `JobService.queue_writes` opens them: a process has one
connection at most that waits for a key's queue. A request that does not fit is refused; lines of
batches and samples of evaluations, which were accepted before, wait until there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from shared.errors import TooManyRequests
from shared.jobs import lanes
from shared.jobs.turns import Who
from shared.keys.principal import Limits


@dataclass(frozen=True, slots=True)
class Queued:
    """The queued jobs and tokens of a key, with its limits."""

    limits: Limits
    jobs: int
    tokens: int

    def refuse_beyond(self, *, jobs: int, tokens: int) -> None:
        """Raises TooManyRequests: so many more jobs or tokens are beyond the limits."""
        wrong = self.limits.beyond(
            jobs=jobs, tokens=tokens, queued_jobs=self.jobs, queued_tokens=self.tokens
        )
        if wrong is not None:
            raise TooManyRequests(wrong)

    def count_fitting(self, tokens: Sequence[int]) -> int:
        """Return how many jobs of those tokens fit, from the first on."""
        total = 0
        for count, more in enumerate(tokens):
            total += more
            if self.limits.beyond(
                jobs=count + 1, tokens=total, queued_jobs=self.jobs, queued_tokens=self.tokens
            ):
                return count
        return len(tokens)


async def read_queued(session: AsyncSession, who: Who, limits: Limits, *, lock: bool) -> Queued:
    """Read what a key has queued now.

    Args:
        lock: keep others from adding to the key's queue until this transaction is over, which
            `JobService.queue_writes` opened. Without it the answer is a hint.
    """
    if not limits.of_queue:
        return Queued(limits, 0, 0)
    if lock:
        await session.execute(lanes.lock_adding(*who))
    jobs, tokens = (await session.execute(lanes.queued_of(*who))).one()
    return Queued(limits, int(jobs), int(tokens))


async def refuse_beyond(
    session: AsyncSession, who: Who, limits: Limits, *, jobs: int, tokens: int
) -> None:
    """Refuse what does not fit. Call it in the transaction that queues.

    Raises:
        TooManyRequests
    """
    (await read_queued(session, who, limits, lock=True)).refuse_beyond(jobs=jobs, tokens=tokens)
