"""Jobs and their attempts: one row a job, the truth about it. CHECK constraints and partial indexes
carry the invariants.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    Boolean,
    CheckConstraint,
    Computed,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base
from shared.jobs.status import TERMINAL, AttemptOutcome, JobStatus, Priority

Timestamp = DateTime(timezone=True)
_TERMINAL_SQL = ", ".join(f"'{s.value}'" for s in JobStatus if s in TERMINAL)


def one_of(column: str, values: type[JobStatus] | type[Priority] | type[AttemptOutcome]) -> str:
    return f"{column} IN ({', '.join(repr(v.value) for v in values)})"


class Job(Base):
    """One generation job. `attempt` is the fence: only the holder of the current attempt may finish
    the row.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text, server_default="anonymous")
    key_id: Mapped[str] = mapped_column(
        Text, server_default=text("''")
    )  # who pays: the key; empty where none was needed
    endpoint: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    priority: Mapped[str] = mapped_column(Text, server_default=Priority.NORMAL.value)
    custom_id: Mapped[str | None] = mapped_column(Text)
    batch_id: Mapped[str | None] = mapped_column(Text)
    batch_line: Mapped[int | None] = mapped_column(Integer)  # of the batch's input file, from 1
    job_metadata: Mapped[dict[str, Any]] = mapped_column(
        "metadata", JSONB, server_default=text("'{}'::jsonb")
    )
    idempotency_key: Mapped[str | None] = mapped_column(Text)
    request_hash: Mapped[str | None] = mapped_column(Text)

    format: Mapped[int] = mapped_column(
        Integer, server_default=text("1")
    )  # of this row: shared.jobs.formats

    # What was asked: the client's body, and what it was resolved to when it was accepted As `json`:
    # jsonb would sort the keys of schemas and inputs, and their order has a meaning
    # (docs/adr/0022).
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    params: Mapped[dict[str, Any]] = mapped_column(JSON)  # SamplingParams.to_json()
    prompt_token_ids: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    tokens: Mapped[int] = mapped_column(
        Integer, server_default=text("0")
    )  # of the prompt, and at most of the answers

    status: Mapped[str] = mapped_column(Text, server_default=JobStatus.QUEUED.value)
    cancel_requested: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    max_attempts: Mapped[int] = mapped_column(Integer, server_default=text("3"))
    losses: Mapped[int] = mapped_column(
        Integer, server_default=text("0")
    )  # attempts of this life lost with their worker
    lost_alone: Mapped[int] = mapped_column(
        Integer, server_default=text("0")
    )  # of these, those that ran alone
    isolation: Mapped[int | None] = mapped_column(
        Integer
    )  # a suspect's: how many of them may run together
    worker_id: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(Timestamp)

    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    queued_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    pushed_at: Mapped[datetime | None] = mapped_column(
        Timestamp
    )  # when its message last went to Redis
    started_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)

    life: Mapped[int] = mapped_column(
        Integer, server_default=text("1")
    )  # an explicit retry begins another
    start_by: Mapped[datetime | None] = mapped_column(Timestamp)
    complete_by: Mapped[datetime | None] = mapped_column(Timestamp)
    # The next that may pass: among its key's jobs of a queue, those with a deadline go first.
    deadline: Mapped[datetime | None] = mapped_column(
        Timestamp, Computed("LEAST(start_by, complete_by)", persisted=True)
    )
    sequence: Mapped[int] = mapped_column(
        Integer, server_default=text("1")
    )  # moves so far, counted by a trigger
    webhook: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB
    )  # {url | endpoint_id, events, inline_result?, key_id?}
    forecast_seconds: Mapped[float | None] = mapped_column(
        Double
    )  # from submission to end, as told when it came
    max_run_seconds: Mapped[float | None] = mapped_column(Double)  # of one attempt
    retain_seconds: Mapped[float | None] = mapped_column(Double)  # from the end to the purge
    purge_after: Mapped[datetime | None] = mapped_column(Timestamp)
    purged_at: Mapped[datetime | None] = mapped_column(
        Timestamp
    )  # input and output are gone, the row is the ledger
    revision: Mapped[str | None] = mapped_column(Text)  # of the model that ran it last
    pinned_revision: Mapped[str | None] = mapped_column(Text)  # a replay's: no other may run it
    traceparent: Mapped[str | None] = mapped_column(
        Text
    )  # W3C's: the trace that attempts and webhooks belong to
    replay_of: Mapped[str | None] = mapped_column(Text)

    progress: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB
    )  # {tokens_committed, tokens_total, step}
    result: Mapped[dict[str, Any] | None] = mapped_column(
        JSON
    )  # the endpoint's own response object
    steps: Mapped[bytes | None] = mapped_column(
        LargeBinary
    )  # how the answer came about (shared.jobs.steps)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB)  # {code, message, param, retryable}
    usage: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    timing: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    diffusion: Mapped[dict[str, Any] | None] = mapped_column(JSONB)

    __table_args__ = (
        CheckConstraint(one_of("status", JobStatus), "status"),
        CheckConstraint(one_of("priority", Priority), "priority"),
        CheckConstraint("attempt >= 0 AND failures >= 0 AND failures <= max_attempts", "counts"),
        CheckConstraint(
            "(status = 'running') = (lease_until IS NOT NULL) AND (status = 'running') = (worker_id IS NOT NULL)",
            "lease_while_running",
        ),
        CheckConstraint(
            f"(status IN ({_TERMINAL_SQL})) = (finished_at IS NOT NULL)", "finished_at_when_done"
        ),
        CheckConstraint(
            "(status = 'succeeded' AND purged_at IS NULL) = (result IS NOT NULL)",
            "result_when_succeeded",
        ),
        CheckConstraint("purged_at IS NULL OR finished_at IS NOT NULL", "purged_when_done"),
        CheckConstraint("status <> 'failed' OR error IS NOT NULL", "error_when_failed"),
        Index(
            "uq_jobs_idempotency",
            "tenant",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "ix_jobs_idempotency_created",
            "created_at",
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "ix_jobs_lane",
            "model",
            "priority",
            "tenant",
            "key_id",
            "deadline",
            "queued_at",
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_unpushed",
            "model",
            "priority",
            "tenant",
            "key_id",
            "deadline",
            "queued_at",
            "id",
            postgresql_where=text("status = 'queued' AND pushed_at IS NULL AND isolation IS NULL"),
        ),
        Index(
            "ix_jobs_pushed",
            "model",
            "priority",
            "pushed_at",
            postgresql_where=text("status = 'queued' AND pushed_at IS NOT NULL"),
        ),
        Index(
            "ix_jobs_pinned",
            "model",
            "pinned_revision",
            postgresql_where=text(
                "status = 'queued' AND pinned_revision IS NOT NULL AND batch_id IS NULL"
            ),
        ),
        Index(
            "ix_jobs_isolation",
            "model",
            "queued_at",
            postgresql_where=text("status = 'queued' AND isolation IS NOT NULL"),
        ),
        Index("ix_jobs_lease", "lease_until", postgresql_where=text("status = 'running'")),
        Index(
            "ix_jobs_start_by",
            "start_by",
            postgresql_where=text("status = 'queued' AND start_by IS NOT NULL"),
        ),
        Index(
            "ix_jobs_complete_by",
            "complete_by",
            postgresql_where=text("status IN ('queued', 'running') AND complete_by IS NOT NULL"),
        ),
        Index(
            "ix_jobs_purge_after",
            "purge_after",
            postgresql_where=text("purge_after IS NOT NULL AND purged_at IS NULL"),
        ),
        Index(
            "ix_jobs_finished_at", "finished_at", postgresql_where=text("finished_at IS NOT NULL")
        ),
        CheckConstraint("(batch_id IS NULL) = (batch_line IS NULL)", "line_of_a_batch"),
        Index(
            "uq_jobs_batch_line",
            "batch_id",
            "batch_line",
            unique=True,
            postgresql_where=text("batch_id IS NOT NULL"),
        ),
        Index(
            "ix_jobs_batch_status",
            "batch_id",
            "status",
            "batch_line",
            postgresql_where=text("batch_id IS NOT NULL"),
        ),
        Index("ix_jobs_request", "tenant", "request_hash", "created_at"),
        Index("ix_jobs_tenant_id", "tenant", "id"),
        Index("ix_jobs_tenant_status_id", "tenant", "status", "id"),
        Index("ix_jobs_tenant_model_status_id", "tenant", "model", "status", "id"),
        Index("ix_jobs_batch_id", "batch_id", "id", postgresql_where=text("batch_id IS NOT NULL")),
        Index(
            "ix_jobs_metadata",
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
        ),
    )


class Attempt(Base):
    """One execution of a job by one worker."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True)
    life: Mapped[int] = mapped_column(Integer, server_default=text("1"))
    worker_id: Mapped[str] = mapped_column(Text)
    outcome: Mapped[str] = mapped_column(Text, server_default=AttemptOutcome.RUNNING.value)
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    ended_at: Mapped[datetime | None] = mapped_column(Timestamp)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    alone: Mapped[bool] = mapped_column(
        Boolean, server_default=text("false")
    )  # its worker ran nothing else

    __table_args__ = (
        CheckConstraint(one_of("outcome", AttemptOutcome), "outcome"),
        CheckConstraint("(outcome = 'running') = (ended_at IS NULL)", "ended_at_when_over"),
        Index(
            "uq_attempts_one_running",
            "job_id",
            unique=True,
            postgresql_where=text("outcome = 'running'"),
        ),
    )
