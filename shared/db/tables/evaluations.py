"""Evaluations. The answers are ordinary rows of `jobs`, whose `batch_id` is the run and
`batch_line` the sample's number.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base
from shared.evaluations.status import EvaluationStatus, RunStatus

Timestamp = DateTime(timezone=True)
OUTCOMES = ("error", "failed", "passed")


def _one_of(column: str, values: list[str]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


class Evaluation(Base):
    """A dataset, a template and graders; `holder` is the fence of the caretaker that works on it."""

    __tablename__ = "evaluations"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, server_default=EvaluationStatus.IN_PROGRESS.value)
    content_hash: Mapped[str] = mapped_column(Text)  # of the items, the template and the graders
    dataset: Mapped[dict[str, Any]] = mapped_column(
        JSONB
    )  # {file_id | bundled, filename?, limit?, hash}
    endpoint: Mapped[str] = mapped_column(Text)
    template: Mapped[Any] = mapped_column(JSON)  # a string, or messages
    graders: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    evaluation_metadata: Mapped[dict[str, Any]] = mapped_column(
        "metadata", JSONB, server_default=text("'{}'::jsonb")
    )
    items: Mapped[int] = mapped_column(Integer)
    window_seconds: Mapped[float] = mapped_column(Double)

    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    cancelling_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)
    holder: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(Timestamp)
    deleted_at: Mapped[datetime | None] = mapped_column(Timestamp)  # its rows go in chunks

    __table_args__ = (
        Index(
            "ix_evaluations_deleted", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")
        ),
        CheckConstraint(_one_of("status", [s.value for s in EvaluationStatus]), "status"),
        CheckConstraint(
            "(status IN ('in_progress', 'cancelling')) = (finished_at IS NULL)",
            "finished_when_over",
        ),
        Index("uq_evaluations_content", "tenant", "content_hash", unique=True),
        Index("ix_evaluations_tenant_id", "tenant", "id"),
        Index(
            "ix_evaluations_open",
            "created_at",
            postgresql_where=text("status IN ('in_progress', 'cancelling')"),
        ),
    )


class EvaluationItem(Base):
    """A line of the dataset, kept: the file may go."""

    __tablename__ = "evaluation_items"

    evaluation_id: Mapped[str] = mapped_column(
        ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True)  # from 1
    line: Mapped[int] = mapped_column(Integer)  # of the file
    key: Mapped[str] = mapped_column(
        Text
    )  # of its content: the same item in another evaluation has the same
    cluster: Mapped[str] = mapped_column(Text)  # of its prompt: items that ask the same
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class EvaluationRun(Base):
    """One configuration. Sample `number` is `repeat * items + item`, repeats from 0: more seeds
    only append.
    """

    __tablename__ = "evaluation_runs"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluations.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(Integer)
    name: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, server_default=RunStatus.IN_PROGRESS.value)
    key_id: Mapped[str] = mapped_column(
        Text, server_default=""
    )  # of who pays: who added to it last
    model: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(
        Text
    )  # of the model, when it was added; no other may answer
    fields: Mapped[dict[str, Any]] = mapped_column(
        JSON
    )  # of every request: max_tokens, diffusion, ...
    seeds: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    content_hash: Mapped[str] = mapped_column(Text)  # of model, revision and fields
    error: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB(none_as_null=True)
    )  # {code, message, param}, when failed
    total: Mapped[int] = mapped_column(Integer)
    stored: Mapped[int] = mapped_column(
        Integer, server_default=text("0")
    )  # samples that are jobs, or could not be
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint(_one_of("status", [s.value for s in RunStatus]), "status"),
        CheckConstraint("stored >= 0 AND stored <= total", "stored"),
        CheckConstraint("(status = 'in_progress') = (finished_at IS NULL)", "finished_when_over"),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", "error_when_failed"),
        Index("uq_evaluation_runs_name", "evaluation_id", "name", unique=True),
        Index("uq_evaluation_runs_content", "evaluation_id", "content_hash", unique=True),
    )


class EvaluationSample(Base):
    """One graded answer, or what became of it instead."""

    __tablename__ = "evaluation_samples"

    run_id: Mapped[str] = mapped_column(
        ForeignKey("evaluation_runs.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    item: Mapped[int] = mapped_column(Integer)
    repeat: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[str | None] = mapped_column(Text)
    outcome: Mapped[str] = mapped_column(Text)
    output: Mapped[str | None] = mapped_column(Text)
    verdicts: Mapped[list[dict[str, Any]]] = mapped_column(
        JSONB, server_default=text("'[]'::jsonb")
    )
    error: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB(none_as_null=True)
    )  # of the job: {code, message, param}
    completion_tokens: Mapped[int | None] = mapped_column(Integer)
    forwards: Mapped[int | None] = mapped_column(Integer)
    latency_ms: Mapped[float | None] = mapped_column(Double)  # in the engine
    queued_ms: Mapped[float | None] = mapped_column(Double)
    device_ms: Mapped[float | None] = mapped_column(Double)
    started_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint(_one_of("outcome", list(OUTCOMES)), "outcome"),
        Index("ix_evaluation_samples_outcome", "run_id", "outcome", "item"),
    )
