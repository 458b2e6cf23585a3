"""What a key may have queued at once."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from shared.errors import TooManyRequests
from shared.jobs import lanes
from shared.jobs.turns import Who
from shared.keys.principal import Limits


async def refuse_beyond(session: AsyncSession, who: Who, limits: Limits, *, jobs: int, tokens: int) -> None:
    """Call it in the transaction that queues them: whoever adds to the same queue waits until that is over, so that any
    number of requests at once, at any number of API processes, stay within the limit together.

    Raises:
        TooManyRequests: so many more jobs or tokens are beyond the key's limits.
    """
    if limits.queued_jobs is None and limits.queued_tokens is None:
        return
    await session.execute(lanes.lock_adding(*who))
    queued = (await session.execute(lanes.queued_of(*who))).one()
    wrong = limits.beyond(jobs=jobs, tokens=tokens, queued_jobs=int(queued[0]), queued_tokens=int(queued[1]))
    if wrong is not None:
        raise TooManyRequests(wrong)
