"""The closed set of job states and the one table of moves between them.

            submit (API)
              │
              ▼      claim (worker)
           queued ───────────────────► running ──┬─► succeeded   finish (worker)
            │ ▲ ▲                        │       ├─► failed      finish (worker), sweeper at
                                                                 max_attempts
            │ │ └────────────────────────┘       ├─► cancelled   finish (worker), sweeper when its
                                                                 worker is gone
            │ │   drain, retryable failure       └─► expired     finish (worker), sweeper:
                                                                 complete_by, max_run_seconds
            │ │   (worker), lease ran out (sweeper)
            │ │
            │ └── failed, cancelled, expired      retry (API): another life of the job; succeeded is
                  final
            ├─► failed                            sweeper: a replay whose revision of the model
                                                  nobody serves any more
            ├─► cancelled                         cancel (API)
            └─► expired                           sweeper: start_by, complete_by

Per state, who moves a job in and out: docs/jobs.md.

Every move is `UPDATE jobs ... WHERE status IN (allowed) RETURNING` in `shared.jobs.repository`, so
two cannot both win.
"""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset(
    {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}
)

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset(
        {JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}
    ),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, *TERMINAL}),
    JobStatus.SUCCEEDED: frozenset(),
    # Only by an explicit retry.
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
    JobStatus.EXPIRED: frozenset({JobStatus.QUEUED}),
}


def sources(target: JobStatus) -> tuple[str, ...]:
    """The states from which a job may move to `target`."""
    return tuple(s.value for s in JobStatus if target in TRANSITIONS[s])


RETRIABLE = tuple(s for s in JobStatus if s in TERMINAL and JobStatus.QUEUED in TRANSITIONS[s])


class AttemptOutcome(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LOST = "lost"  # its lease ran out
    DRAINED = "drained"  # its worker shut down and gave it back


class Priority(StrEnum):
    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BULK = "bulk"

    @property
    def rank(self) -> int:
        """0 is served first."""
        return list(Priority).index(self)
