"""Push the messages of queued rows again, after their COMMIT."""

from __future__ import annotations

from collections.abc import Sequence

import redis
from sqlalchemy import Row

from shared.db.session import Database
from shared.jobs import repository
from shared.jobs.status import JobStatus
from shared.queue.messages import push_sync


def push_again(
    database: Database, client: redis.Redis, rows: Sequence[Row[tuple[object, ...]]]
) -> None:
    """Push the messages of those rows that are queued and no suspects, and note it. Call it after
    their COMMIT.

    Raises:
        redis.RedisError: Redis is away; `pushed_at` stays as it was and a later sweep pushes them.
    """
    queued = [
        row
        for row in rows
        if getattr(row, "status", JobStatus.QUEUED) == JobStatus.QUEUED
        and getattr(row, "isolation", None) is None
    ]
    if not queued:
        return
    push_sync(client, ((row.id, row.model, row.priority) for row in queued))
    with database.write() as session:
        session.execute(repository.mark_pushed([row.id for row in queued]))
