"""The caretaker: a thread in every worker, of which one at a time works, behind an advisory lock.

    expired leases     back to the queue, or to their end (`repository.sweep_expired`), then pushed
    missing messages   jobs whose message Redis no longer has are pushed again, bounded: only as many as the queue is
                       short of the rows that were pushed (jobs never pushed are the dispatcher's)
    deadlines          queued jobs that are too late expire; running ones too, should their worker not see to it
    gone revisions     replays that are bound to a revision of their model that no worker serves any more fail
    retention          what `retain_for` has run out for is purged; very old ledger rows go, both in batches
    old keys           idempotency keys older than 24 h are freed
    silent workers     are called stopped; those that stopped long ago are folded into one row a model

It is what makes "Redis lost everything" cost seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby

import redis
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Row, func, select
from sqlalchemy.exc import SQLAlchemyError

from shared import serving
from shared.db.session import Database
from shared.events import Event, EventPublisher
from shared.jobs import caretaking, lanes, repository
from shared.jobs.status import TERMINAL, JobStatus
from shared.queue.messages import push_sync
from shared.queue.names import queue_name
from shared.usage import repository as usage
from shared.worker_stats import folded

SWEEP_LOCK = 0x7653_7770  # any number that nothing else in the database uses ("vSwp")
IDEMPOTENCY_SECONDS = 24 * 3600
REPUSH_BATCH = 1_000  # messages per queue and round
FOLD_WORKERS_SECONDS = 7 * 86_400.0
SILENT_LEASES = 10  # a worker silent for so many leases is called stopped

_log = structlog.get_logger(__name__)


class Sweeper:
    def __init__(
        self,
        database: Database,
        client: redis.Redis,
        publisher: EventPublisher,
        *,
        sweep_seconds: float,
        repush_after_seconds: float,
        lease_seconds: float,
        forget_after_seconds: float | None = None,
        count: Callable[..., None] = lambda **amounts: None,
    ) -> None:
        self._database = database
        self._redis = client
        self._publisher = publisher
        self._seconds = sweep_seconds
        self._repush_after = repush_after_seconds
        self._lease_seconds = lease_seconds
        self._forget_after = forget_after_seconds
        self._count = count
        self._silent_seconds = SILENT_LEASES * lease_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vdiff-sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.sweep()
            except SQLAlchemyError as exc:
                _log.warning("sweep_failed", error=type(exc).__name__)
            except (RedisError, OSError) as exc:
                _log.warning("sweep_could_not_push", error=str(exc))

    def sweep(self) -> bool:
        """One round; False when another process is at it."""
        with self._database.write() as guard:
            if not guard.execute(select(func.pg_try_advisory_xact_lock(SWEEP_LOCK))).scalar_one():
                return False
            self._expired_leases()
            self._passed_deadlines()
            self._gone_revisions()
            self._retention()
            self._fold_workers()
            self._missing_messages()
        return True

    def _expired_leases(self) -> None:
        with self._database.write() as session:
            moved = session.execute(repository.sweep_expired()).all()
            session.execute(caretaking.forget_idempotency_keys(older_than_seconds=IDEMPOTENCY_SECONDS))
            session.execute(lanes.roll_up())
            session.execute(usage.roll_up())
            session.execute(lanes.forget_idle_lanes())
            session.execute(serving.stop_silent_workers(silent_seconds=self._silent_seconds))
        for row in moved:
            _log.warning("lease_ran_out", job_id=row.id, attempt=row.attempt, now=row.status)
        self._count(leases_expired=len(moved))
        push_again(self._database, self._redis, moved)
        self._publisher.publish(
            Event(row.id, "done", {"status": row.status}) for row in moved if JobStatus(row.status) in TERMINAL
        )

    def _fold_workers(self) -> None:
        """Of workers that stopped long ago one row a model is kept, with what all of them counted: counters never fall."""
        with self._database.write() as session:
            old = session.execute(serving.foldable_workers(older_than_seconds=FOLD_WORKERS_SECONDS)).all()
            for _, rows in groupby(old, key=lambda row: row.model):
                first, *rest = rows
                if rest:
                    session.execute(serving.keep_stats(first.id, folded(row.stats for row in (first, *rest))))
                    session.execute(serving.delete_workers([row.id for row in rest]))

    def _passed_deadlines(self) -> None:
        with self._database.write() as session:
            moved = session.execute(caretaking.sweep_deadlines(grace_seconds=self._lease_seconds)).all()
        for row in moved:
            _log.info("deadline_passed", job_id=row.id, attempt=row.attempt)
        self._count(deadlines_passed=len(moved))
        self._publisher.publish(Event(row.id, "done", {"status": row.status}) for row in moved)

    def _gone_revisions(self) -> None:
        with self._database.write() as session:
            moved = session.execute(caretaking.fail_unservable(silent_seconds=self._silent_seconds)).all()
        for row in moved:
            _log.warning("revision_not_served", job_id=row.id, model=row.model)
        self._count(revisions_gone=len(moved))
        self._publisher.publish(Event(row.id, "done", {"status": row.status}) for row in moved)

    def _retention(self) -> None:
        with self._database.write() as session:
            purged = session.execute(caretaking.purge_due()).scalars().all()
        self._count(jobs_purged=len(purged))
        forgotten: Sequence[str] = ()
        if self._forget_after is not None:
            with self._database.write() as session:
                forgotten = (
                    session.execute(caretaking.delete_old(older_than_seconds=self._forget_after)).scalars().all()
                )
        if purged or forgotten:
            _log.info("retention", purged=len(purged), forgotten=len(forgotten))
            self._publisher.forget([*purged, *forgotten])

    def _missing_messages(self) -> None:
        with self._database.read() as session:
            counts = session.execute(caretaking.pushed_counts()).all()
        for model, priority, pushed in counts:
            waiting = int(self._redis.llen(queue_name(model, priority)))
            missing = min(pushed - waiting, REPUSH_BATCH)
            if missing <= 0:
                continue
            with self._database.read() as session:
                candidates = session.execute(
                    caretaking.repush_candidates(
                        model,
                        priority,
                        repush_after_seconds=self._repush_after,
                        limit=missing,
                    )
                ).all()
            if candidates:
                _log.info("messages_pushed_again", model=model, priority=priority, count=len(candidates))
                push_again(self._database, self._redis, candidates)
                self._count(messages_pushed_again=len(candidates))


def push_again(database: Database, client: redis.Redis, rows: Sequence[Row[tuple[object, ...]]]) -> None:
    """Push the messages of those rows that are queued, and note it. Call it after their COMMIT.

    Raises:
        redis.RedisError: Redis is away; `pushed_at` stays as it was and a later sweep pushes them.
    """
    queued = [row for row in rows if getattr(row, "status", JobStatus.QUEUED) == JobStatus.QUEUED]
    if not queued:
        return
    push_sync(client, ((row.id, row.model, row.priority) for row in queued))
    with database.write() as session:
        session.execute(repository.mark_pushed([row.id for row in queued]))
