"""Models that were ever served, and the workers that serve them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base

Timestamp = DateTime(timezone=True)
WORKER_STATES = ("loading", "ready", "draining", "stopped")


class Model(Base):
    """A served model: its card and its tokenizer's files, so that the API counts tokens without
    torch.
    """

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    position: Mapped[int] = mapped_column(Integer, Identity())  # order of first registration
    card: Mapped[dict[str, Any]] = mapped_column(JSONB)
    tokenizer_files: Mapped[dict[str, str]] = mapped_column(JSONB)
    tokenizer_hash: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class Worker(Base):
    """One worker process and its heartbeat."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"))
    hostname: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    device: Mapped[str] = mapped_column(Text)
    slots: Mapped[int] = mapped_column(Integer)
    version: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(
        Text
    )  # of the model; "" has none, NULL: a program that did not say
    state: Mapped[str] = mapped_column(Text)
    stats: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'::jsonb"))
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_beat_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(s) for s in WORKER_STATES)})", "state"),
        Index(
            "ix_workers_live", "model", "last_beat_at", postgresql_where=text("state <> 'stopped'")
        ),
    )


class LeaseClock(Base):
    """One row: since when PostgreSQL has taken writes without a gap (`shared.jobs.lease_clock`)."""

    __tablename__ = "lease_clock"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())  # the latest write
    since: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class WorkerFailure(Base):
    """A worker that could not load its model, and why. It never became a row of `workers`; one row
    per machine and model.
    """

    __tablename__ = "worker_failures"

    hostname: Mapped[str] = mapped_column(Text, primary_key=True)
    model: Mapped[str] = mapped_column(Text, primary_key=True)  # the name it would have served
    code: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    version: Mapped[str] = mapped_column(Text)
    count: Mapped[int] = mapped_column(Integer, server_default=text("1"))
    first_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class MaintenanceCount(Base):
    """Number of times that a duty of `shared.maintenance` did something; a row for each action."""

    __tablename__ = "maintenance_counts"

    action: Mapped[str] = mapped_column(Text, primary_key=True)
    total: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
