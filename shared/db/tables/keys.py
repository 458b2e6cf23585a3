"""API keys. The key itself is nowhere: `key_hash` is its SHA-256."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ARRAY, CheckConstraint, DateTime, Index, Integer, Text, func, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base

Timestamp = DateTime(timezone=True)


class ApiKey(Base):
    """One key of one tenant; several keys may share a tenant, and then its jobs."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    key_hash: Mapped[str] = mapped_column(Text)
    previous_hash: Mapped[str | None] = mapped_column(
        Text
    )  # after a rotation, until previous_until
    previous_until: Mapped[datetime | None] = mapped_column(Timestamp)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    max_queued_jobs: Mapped[int | None] = mapped_column(Integer)
    max_queued_tokens: Mapped[int | None] = mapped_column(Integer)
    weight: Mapped[int] = mapped_column(
        Integer, server_default=text("1")
    )  # turns when keys compete
    webhook_secret: Mapped[str] = mapped_column(Text)  # signs the webhooks of single jobs
    previous_webhook_secret: Mapped[str | None] = mapped_column(Text)  # signs too, until then
    previous_webhook_secret_until: Mapped[datetime | None] = mapped_column(Timestamp)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_used_at: Mapped[datetime | None] = mapped_column(Timestamp)
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    revoked_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (
        CheckConstraint("weight BETWEEN 1 AND 1000", "weight"),
        CheckConstraint(
            "requests_per_minute > 0 AND max_queued_jobs > 0 AND max_queued_tokens > 0",
            "limits_are_positive",
        ),
        CheckConstraint(
            "(previous_hash IS NULL) = (previous_until IS NULL)", "previous_has_an_end"
        ),
        Index("ix_api_keys_tenant", "tenant"),
    )
