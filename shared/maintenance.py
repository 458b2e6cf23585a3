"""Maintenance of the jobs table: two threads in every worker and every API process.

Each thread works under an advisory lock of its own, so that one process at a time does it. A round
in which every duty succeeded is recorded in `maintenance_counts`, and no process begins the next
one before it is due: the number of rounds does not grow with the number of processes. A round that
failed is not recorded, so another process can do better.

    vdiff-sweeper, first things first:
        recover_leases      expired leases go back to the queue, or to their end, and are pushed
        expire_jobs         queued jobs that are too late expire; running ones too, should their
                            worker not see to it
        fail_unservable     replays bound to a revision of their model that no worker serves any
                            more fail
        push_missing        jobs whose message Redis no longer has are pushed again, bounded: only
                            as many as the queue is short of the rows that were pushed (jobs never
                            pushed are the dispatcher's)
    vdiff-housekeeping, what may be late:
        purge_results       results whose `retain_for` is over go
        forget_jobs         very old ledger rows go
        free_keys           idempotency keys older than 24 h are freed
        remove_deleted      removes the rows that deleted webhook endpoints and evaluations leave
                            behind (API only)
        roll_up             lanes, usage and counts are summed up
        stop_silent_workers workers that went silent are called stopped; those of long ago become
                            one row a model

A duty that may have much to do works in chunks, each a short transaction, for a slice of two
seconds (`shared.removals`); what is left waits for the next round, after the others had their turn.
A round with work left is followed by another at once.

A job is taken from its worker only while that worker could have renewed its lease
(`shared.jobs.lease_clock`).

Every duty is isolated (`shared.background`): one that fails keeps no other from its turn. What they
did is counted in PostgreSQL (`maintenance_counts`), in the transaction that did it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import redis
import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError
from sqlalchemy import func, select, text

from shared import counts, maintenance_counts, serving
from shared.background import BackgroundThread, Duty
from shared.db.session import Database, WriteSession
from shared.evaluations import repository as evaluations
from shared.events import Event, EventPublisher
from shared.jobs import caretaking, lanes, lease_clock, repository
from shared.jobs.status import TERMINAL, JobStatus
from shared.queue.names import queue_name
from shared.queue.repush import push_again
from shared.removals import in_chunks, run_chunk
from shared.settings import Settings
from shared.usage import repository as usage
from shared.webhooks import repository as webhooks
from shared.worker_stats import folded

SWEEP_LOCK = 0x7653_7770  # any number that nothing else in the database uses ("vSwp")
HOUSEKEEPING_LOCK = SWEEP_LOCK + 1
# PostgreSQL ends a lock's session that is silent for longer: its process is stopped or cut off
LOCK_IDLE_SECONDS = 20
IDEMPOTENCY_SECONDS = 24 * 3600
REPUSH_BATCH = 1_000  # messages per queue and round
FOLD_WORKERS_SECONDS = 7 * 86_400.0
HOUSEKEEPING_SWEEPS = 4  # rounds of the sweeper for each round of housekeeping
SWEEP_ROUND = "rounds_of_sweeper"
SILENT_LEASES = 10  # a worker silent for so many leases is called stopped
POOL_SIZE = 4  # two threads, each with its lock's session and one that works

_log = structlog.get_logger(__name__)


class Maintenance:
    """The duties and their two threads.

    Args:
        removes_deleted: run the duty `remove_deleted`. The database role of workers may not delete
            those rows.
        failures: counter with the label `duty`, of the process that this runs in.
    """

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
        removes_deleted: bool = True,
        failures: Counter | None = None,
    ) -> None:
        self._database = database
        self._redis = client
        self._publisher = publisher
        self._repush_after = repush_after_seconds
        self._lease_seconds = lease_seconds
        self._forget_after = forget_after_seconds
        self._silent_seconds = SILENT_LEASES * lease_seconds
        self._more = self._more_to_remove = False  # whether a round left work

        self._sweep_seconds = sweep_seconds
        self._housekeeping_seconds = HOUSEKEEPING_SWEEPS * sweep_seconds
        # Processes that remove deleted rows have rounds of their own: others cannot do this duty
        # for them.
        self._housekeeping_round = (
            "rounds_of_housekeeping_api" if removes_deleted else "rounds_of_housekeeping"
        )

        def duties(*runs: Callable[[], None]) -> list[Duty]:
            return [Duty(run.__name__, run, every=0.0, failures=failures) for run in runs]

        self._recovery = duties(
            self.recover_leases, self.expire_jobs, self.fail_unservable, self.push_missing
        )
        self._housekeeping = duties(
            self.purge_results,
            self.forget_jobs,
            self.free_keys,
            *([self.remove_deleted] if removes_deleted else []),
            self.roll_up,
            self.stop_silent_workers,
        )
        self.sweeper = BackgroundThread(
            "vdiff-sweeper", [Duty("sweep", self._sweep, every=sweep_seconds, failures=failures)]
        )
        self.housekeeper = BackgroundThread(
            "vdiff-housekeeping",
            [
                Duty(
                    "housekeeping",
                    self._keep_house,
                    every=self._housekeeping_seconds,
                    failures=failures,
                )
            ],
        )

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        database: Database,
        client: redis.Redis,
        publisher: EventPublisher,
        failures: Counter,
        *,
        removes_deleted: bool,
    ) -> Maintenance:
        """Build it as the settings say."""
        return cls(
            database,
            client,
            publisher,
            sweep_seconds=settings.sweep_seconds,
            repush_after_seconds=settings.repush_after_seconds,
            lease_seconds=settings.lease_seconds,
            forget_after_seconds=settings.ledger_seconds,
            removes_deleted=removes_deleted,
            failures=failures,
        )

    @property
    def threads(self) -> tuple[BackgroundThread, BackgroundThread]:
        return self.sweeper, self.housekeeper

    def sweep(self) -> bool:
        """Do one round of recovery now; return False if another process is doing one."""
        self._more = False
        return self._do_round(SWEEP_LOCK, self._recovery, self.sweeper)

    def keep_house(self) -> bool:
        """Do one round of housekeeping now; return False if another process is doing one."""
        self._more_to_remove = False
        return self._do_round(HOUSEKEEPING_LOCK, self._housekeeping, self.housekeeper)

    def _sweep(self) -> float | None:
        self._more = False
        round_ = SWEEP_ROUND, self._sweep_seconds
        done = self._do_round(SWEEP_LOCK, self._recovery, self.sweeper, round_)
        return 0.0 if done and self._more else None

    def _keep_house(self) -> float | None:
        self._more_to_remove = False
        round_ = self._housekeeping_round, self._housekeeping_seconds
        done = self._do_round(HOUSEKEEPING_LOCK, self._housekeeping, self.housekeeper, round_)
        return 0.0 if done and self._more_to_remove else None

    def _is_steady(self, session: WriteSession) -> bool:
        """Return whether workers could renew their leases all the time, for one lease until now."""
        return bool(
            session.execute(lease_clock.is_steady(lease_seconds=self._lease_seconds)).scalar_one()
        )

    def _do_round(
        self,
        lock: int,
        duties: Sequence[Duty],
        thread: BackgroundThread,
        round_: tuple[str, float] | None = None,
    ) -> bool:
        """Do one round under the lock; return False if another process is doing one, or did the
        last one recently.

        Args:
            round_: name of the round and seconds between two of them over all processes; None does
                one in any case.
        """
        with self._database.write() as guard:
            if not guard.execute(select(func.pg_try_advisory_xact_lock(lock))).scalar_one():
                return False
            if round_ and guard.execute(maintenance_counts.happened_within(*round_)).scalar_one():
                return False
            # Should this process be stopped or cut off, its lock is free soon: every duty is safe
            # to run twice at once.
            guard.execute(
                text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCK_IDLE_SECONDS}s'")
            )
            with self._database.write() as session:
                session.execute(lease_clock.pulse(lease_seconds=self._lease_seconds))
            for duty in duties:
                if thread.stopping.is_set():
                    return True
                if duty.is_due():
                    thread.turn()
                    duty.perform()
            has_more = self._more if thread is self.sweeper else self._more_to_remove
            if round_ and not has_more and not any(duty.streak for duty in duties):
                guard.execute(maintenance_counts.add(round_[0], 1))
        return True

    # Recovery

    def recover_leases(self) -> None:
        """Move jobs whose lease ran out back to the queue, or to their end."""
        with self._database.write() as session:
            if not self._is_steady(session):
                return
            moved = session.execute(repository.sweep_expired()).all()
            ended = sum(row.status == JobStatus.FAILED for row in moved)
            self._count(session, leases_expired=len(moved), jobs_quarantined=ended)
        for row in moved:
            _log.warning("lease_ran_out", job_id=row.id, attempt=row.attempt, now=row.status)
        try:
            push_again(self._database, self._redis, moved)
        finally:
            self._announce(moved)

    def expire_jobs(self) -> None:
        """Expire jobs that nobody began, or finished, in time."""

        def chunk() -> int:
            with self._database.write() as session:
                statement = caretaking.sweep_deadlines(
                    grace_seconds=self._lease_seconds, running_too=self._is_steady(session)
                )
                moved = session.execute(statement).all()
                self._count(session, deadlines_passed=len(moved))
            for row in moved:
                _log.info("deadline_passed", job_id=row.id, attempt=row.attempt)
            self._announce(moved)
            return len(moved)

        self._more |= in_chunks(chunk, repository.SWEEP_BATCH, self.sweeper.stopping).is_cut

    def fail_unservable(self) -> None:
        """Fail replays of a revision that no worker serves any more."""

        def chunk() -> int:
            with self._database.write() as session:
                if not self._is_steady(session):
                    return 0  # workers that could not be heard of are not gone
                moved = session.execute(
                    caretaking.fail_unservable(silent_seconds=self._silent_seconds)
                ).all()
                self._count(session, revisions_gone=len(moved))
            for row in moved:
                _log.warning("revision_not_served", job_id=row.id, model=row.model)
            self._announce(moved)
            return len(moved)

        self._more |= in_chunks(chunk, repository.SWEEP_BATCH, self.sweeper.stopping).is_cut

    def push_missing(self) -> None:
        """Push the messages again that Redis should have and has not."""
        with self._database.read() as session:
            pushed_counts = session.execute(caretaking.pushed_counts()).all()
        for model, priority, pushed in pushed_counts:
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
                push_again(self._database, self._redis, candidates)
                _log.info(
                    "messages_pushed_again", model=model, priority=priority, count=len(candidates)
                )
                with self._database.write() as write:
                    self._count(write, messages_pushed_again=len(candidates))

    # Housekeeping

    def purge_results(self) -> None:
        """Delete input and output of jobs whose `retain_for` is over."""

        def chunk() -> int:
            with self._database.write() as session:
                purged = session.execute(caretaking.purge_due()).scalars().all()
                self._count(session, jobs_purged=len(purged))
            self._forget_streams(purged)
            return len(purged)

        self._remove("retention", chunk, caretaking.REMOVE_CHUNK)

    def forget_jobs(self) -> None:
        """Delete the ledger rows of jobs that ended long ago."""
        seconds = self._forget_after
        if seconds is None:
            return

        def chunk() -> int:
            with self._database.write() as session:
                forgotten = (
                    session.execute(caretaking.delete_old(older_than_seconds=seconds))
                    .scalars()
                    .all()
                )
            self._forget_streams(forgotten)
            return len(forgotten)

        self._remove("jobs_forgotten", chunk, caretaking.REMOVE_CHUNK)

    def _forget_streams(self, job_ids: Sequence[str]) -> None:
        """Delete the jobs' event streams; without Redis they end by themselves, and retention goes
        on.
        """
        with suppress(RedisError, OSError):
            self._publisher.forget(job_ids)

    def free_keys(self) -> None:
        """Free idempotency keys that are a day old."""

        def chunk() -> int:
            with self._database.write() as session:
                statement = caretaking.forget_idempotency_keys(
                    older_than_seconds=IDEMPOTENCY_SECONDS
                )
                return len(session.execute(statement).all())

        self._remove("keys_freed", chunk, caretaking.REMOVE_CHUNK)

    def remove_deleted(self) -> None:
        """Remove rows of webhook endpoints and evaluations that were deleted."""
        for statements in (webhooks.remove_deleted(), evaluations.remove_deleted()):
            self._remove(
                "deleted_removed", functools.partial(run_chunk, self._database, statements), 1
            )

    def _remove(self, event: str, chunk: Callable[[], int], size: int) -> None:
        done = in_chunks(chunk, size, self.housekeeper.stopping)
        if done.count:
            _log.info(event, count=done.count)
        self._more_to_remove |= done.is_cut

    def roll_up(self) -> None:
        """Sum up what changed in lanes, usage and counts."""
        with self._database.write() as session:
            session.execute(lanes.roll_up())
            session.execute(usage.roll_up())
            session.execute(counts.roll_up())
            session.execute(lanes.forget_idle_lanes())

    def stop_silent_workers(self) -> None:
        """Call silent workers stopped; fold those of long ago into one row a model, so that
        counters never fall.
        """
        with self._database.write() as session:
            if self._is_steady(session):
                session.execute(serving.stop_silent_workers(silent_seconds=self._silent_seconds))
            old = session.execute(
                serving.foldable_workers(older_than_seconds=FOLD_WORKERS_SECONDS)
            ).all()
            for _, rows in groupby(old, key=lambda row: row.model):
                first, *rest = rows
                if rest:
                    session.execute(
                        serving.keep_stats(first.id, folded(row.stats for row in (first, *rest)))
                    )
                    session.execute(serving.delete_workers([row.id for row in rest]))

    def _count(self, session: WriteSession, **amounts: int) -> None:
        for action, amount in amounts.items():
            if amount:
                session.execute(maintenance_counts.add(action, amount))

    def _announce(self, moved: Iterable[Any]) -> None:
        """Publish `done` of those rows that ended. Raises redis.RedisError: waiting clients read
        their rows anyway.
        """
        self._publisher.publish(
            Event(row.id, "done", {"status": row.status})
            for row in moved
            if JobStatus(row.status) in TERMINAL
        )
