"""Numbers of rows of each kind and state of a tenant, kept by triggers as deltas that are summed up
(migration 0023).

Of jobs only those that ended are here; `lanes` has what is queued, and few run. A file's `status`
is its purpose.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Identity, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base

_ZERO = text("0")


class Count(Base):
    __tablename__ = "counts"

    kind: Mapped[str] = mapped_column(Text, primary_key=True)  # job, batch, evaluation, file
    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    status: Mapped[str] = mapped_column(Text, primary_key=True)
    amount: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    bytes: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)  # of files


class CountDelta(Base):
    """A change that is not in `counts` yet."""

    __tablename__ = "count_deltas"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    tenant: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    amount: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
    bytes: Mapped[int] = mapped_column(BigInteger, server_default=_ZERO)
