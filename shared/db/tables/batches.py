"""Files, and batches of jobs. A batch's lines are ordinary rows of `jobs`, with `batch_id` and
`batch_line`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
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
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from shared.batches.status import BatchStatus
from shared.db.base import Base

Timestamp = DateTime(timezone=True)
FILE_STATES = ("uploading", "ready", "deleting")


def _one_of(column: str, values: list[str]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


class File(Base):
    """A file of a tenant. Only a `ready` one can be seen; its content is in `store`, under its id."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(Text)
    store: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, server_default="uploading")
    bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint(_one_of("status", list(FILE_STATES)), "status"),
        Index("ix_files_tenant_id", "tenant", "id"),
        Index("ix_files_tenant_purpose", "tenant", "purpose", "id"),
        Index("ix_files_unfinished", "created_at", postgresql_where=text("status <> 'ready'")),
        Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )


class FileChunk(Base):
    """A piece of a file whose store is the database."""

    __tablename__ = "file_chunks"

    file_id: Mapped[str] = mapped_column(
        ForeignKey("files.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Batch(Base):
    """An OpenAI batch. `holder` is the fence of the caretaker that works on it."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str] = mapped_column(Text, server_default=text("''"))  # its lines' too
    status: Mapped[str] = mapped_column(Text, server_default=BatchStatus.VALIDATING.value)
    endpoint: Mapped[str] = mapped_column(Text)
    input_file_id: Mapped[str] = mapped_column(Text)
    completion_window: Mapped[str] = mapped_column(Text)
    window_seconds: Mapped[float] = mapped_column(Double)
    batch_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB)
    output_expires_seconds: Mapped[float | None] = mapped_column(Double)
    limits: Mapped[dict[str, Any]] = mapped_column(
        JSONB
    )  # of the key that made it: {queued_jobs, queued_tokens}
    idempotency_key: Mapped[str | None] = mapped_column(Text)
    request_hash: Mapped[str] = mapped_column(Text)

    model: Mapped[str | None] = mapped_column(Text)
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSONB
    )  # of validation: {code, message, param, line}
    total: Mapped[int | None] = mapped_column(Integer)  # lines, once all were validated
    stored: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # lines that are jobs
    summary: Mapped[dict[str, Any] | None] = mapped_column(
        JSONB
    )  # at the end: {completed, failed, usage, top_errors}
    output_file_id: Mapped[str | None] = mapped_column(Text)
    error_file_id: Mapped[str | None] = mapped_column(Text)

    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)
    in_progress_at: Mapped[datetime | None] = mapped_column(Timestamp)
    finalizing_at: Mapped[datetime | None] = mapped_column(Timestamp)
    completed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    failed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    expired_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancelling_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancelled_at: Mapped[datetime | None] = mapped_column(Timestamp)

    sequence: Mapped[int] = mapped_column(
        Integer, server_default=text("1")
    )  # moves so far, counted by a trigger
    holder: Mapped[str | None] = mapped_column(Text)
    lease_until: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint(_one_of("status", [s.value for s in BatchStatus]), "status"),
        CheckConstraint("stored >= 0 AND (total IS NULL OR stored <= total)", "stored"),
        CheckConstraint("status <> 'failed' OR errors IS NOT NULL", "errors_when_failed"),
        Index("ix_batches_tenant_id", "tenant", "id"),
        Index("ix_batches_input_file", "input_file_id"),
        Index(
            "uq_batches_idempotency",
            "tenant",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "ix_batches_open",
            "created_at",
            postgresql_where=text(
                "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
            ),
        ),
    )
