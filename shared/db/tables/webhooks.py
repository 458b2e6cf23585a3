"""Webhooks: endpoints, the outbox of events, their deliveries, every attempt.

Events and deliveries are written by a trigger on `jobs` (migration 0005) in the transaction that
moves the job: whatever moves it, and wherever a process dies, an event is there exactly when its
move is.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
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
DELIVERY_STATES = ("pending", "delivered", "failed", "discarded")


class WebhookEndpoint(Base):
    """A URL at which a tenant receives its events."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text, server_default=text("''"))
    events: Mapped[list[str]] = mapped_column(ARRAY(Text))
    metadata_filter: Mapped[dict[str, Any]] = mapped_column(
        JSONB, server_default=text("'{}'::jsonb")
    )
    inline_result: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)
    previous_until: Mapped[datetime | None] = mapped_column(Timestamp)
    enabled: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    disabled_reason: Mapped[str | None] = mapped_column(Text)
    last_success_at: Mapped[datetime | None] = mapped_column(Timestamp)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column(
        Timestamp
    )  # its deliveries go in chunks, then the row

    __table_args__ = (
        Index(
            "ix_webhook_endpoints_deleted",
            "deleted_at",
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
        CheckConstraint(
            "(previous_secret IS NULL) = (previous_until IS NULL)", "previous_has_an_end"
        ),
        Index("ix_webhook_endpoints_tenant", "tenant", "id"),
    )


class WebhookSecret(Base):
    """Signs the webhooks of single jobs of a tenant that uses no key of its own."""

    __tablename__ = "webhook_secrets"

    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)  # signs too, until then
    previous_secret_until: Mapped[datetime | None] = mapped_column(Timestamp)


class WebhookEvent(Base):
    """Something that happened; its id is `webhook-id`, the same for every attempt and receiver."""

    __tablename__ = "webhook_events"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(
        Text
    )  # no foreign key: an event outlives its job's ledger row
    batch_id: Mapped[str | None] = mapped_column(
        Text
    )  # likewise; an event is about a job, about a batch, or a test
    status: Mapped[str | None] = mapped_column(Text)
    sequence: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (
        Index("ix_webhook_events_created_at", "created_at"),
        Index("ix_webhook_events_job", "job_id", postgresql_where=text("job_id IS NOT NULL")),
    )


class WebhookDelivery(Base):
    """One event on its way to one receiver: a registered endpoint, or the URL that a job named."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    event_id: Mapped[str] = mapped_column(ForeignKey("webhook_events.id", ondelete="CASCADE"))
    tenant: Mapped[str] = mapped_column(Text)
    endpoint_id: Mapped[str | None] = mapped_column(
        ForeignKey("webhook_endpoints.id", ondelete="CASCADE")
    )
    url: Mapped[str | None] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(Text)  # whose secret signs, of a job's own URL
    inline_result: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    status: Mapped[str] = mapped_column(Text, server_default=text("'pending'"))
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    next_attempt_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    lease_until: Mapped[datetime | None] = mapped_column(Timestamp)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    delivered_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint(f"status IN ({', '.join(repr(s) for s in DELIVERY_STATES)})", "status"),
        CheckConstraint("(endpoint_id IS NULL) <> (url IS NULL)", "one_receiver"),
        Index(
            "ix_webhook_deliveries_due",
            "next_attempt_at",
            postgresql_where=text("status = 'pending'"),
        ),
        Index("ix_webhook_deliveries_tenant", "tenant", "status", "id"),
        Index("ix_webhook_deliveries_endpoint_status", "endpoint_id", "status", "id"),
        Index(
            "ix_webhook_deliveries_turns",
            "tenant",
            "next_attempt_at",
            postgresql_where=text("status = 'pending'"),
        ),
        Index("ix_webhook_deliveries_event", "event_id"),
        Index(
            "ix_webhook_deliveries_leased",
            "lease_until",
            postgresql_where=text("status = 'pending' AND lease_until IS NOT NULL"),
        ),
    )


class WebhookAttempt(Base):
    """One request that was sent, or refused before it was."""

    __tablename__ = "webhook_attempts"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    delivery_id: Mapped[int] = mapped_column(
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE")
    )
    attempt: Mapped[int] = mapped_column(Integer)
    status_code: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[str | None] = mapped_column(Text)
    duration_ms: Mapped[float] = mapped_column(Double)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (Index("ix_webhook_attempts_delivery", "delivery_id", "id"),)


class Sender(Base):
    """One process that sends webhooks, its heartbeat, and what it counted."""

    __tablename__ = "senders"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    hostname: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    version: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text, server_default="ready")
    metrics: Mapped[list[Any]] = mapped_column(JSONB, server_default=text("'[]'::jsonb"))
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_beat_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (CheckConstraint("state IN ('ready', 'stopped')", "state"),)
