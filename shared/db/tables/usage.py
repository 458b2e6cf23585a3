"""Usage per key, model and day. A trigger on `jobs` (migration 0007) writes it, so that nothing
ends uncounted.
"""

from __future__ import annotations

from datetime import date

from sqlalchemy import BigInteger, Date, Double, Identity, Index, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base

_ZERO = text("0")


class _Amounts:
    """The amounts of one key with one model on one day (UTC)."""

    succeeded: Mapped[int] = mapped_column(
        BigInteger, server_default=_ZERO
    )  # lives of jobs that ended so
    failed: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    cancelled: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    expired: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    attempts: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    forwards: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    run_seconds: Mapped[float] = mapped_column(
        Double, server_default=_ZERO
    )  # attempts, from claim to end
    device_seconds: Mapped[float] = mapped_column(
        Double, server_default=_ZERO
    )  # their share of the engine's steps


class Usage(_Amounts, Base):
    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    key_id: Mapped[str] = mapped_column(Text, primary_key=True)  # '': no key was needed
    model: Mapped[str] = mapped_column(Text, primary_key=True)

    __table_args__ = (Index("ix_usage_day", "day"),)


class UsageDelta(_Amounts, Base):
    """One end that is not in `usage` yet; nobody who ends a job waits for a row that others write."""

    __tablename__ = "usage_deltas"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    day: Mapped[date] = mapped_column(Date)
    tenant: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
