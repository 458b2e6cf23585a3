"""Tables of the dispatcher: how much each key has queued, and whose turn it is.

`lanes` and `lane_deltas` are written by triggers on `jobs` (migration 0004), so that no statement
can forget it: every job that enters or leaves `queued` adds a row to `lane_deltas`, and whoever
looks sums them up into `lanes`. Nobody waits for anybody: there is no counter that all submissions
would have to lock.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Double, Identity, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from shared.db.base import Base


class Queue(Base):
    """The jobs of one model and priority. Its row is the lock of whoever dispatches from it."""

    __tablename__ = "queues"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    priority: Mapped[str] = mapped_column(Text, primary_key=True)
    clock: Mapped[float] = mapped_column(
        Double, server_default=text("0")
    )  # virtual time: the last turn's beginning


class Lane(Base):
    """One key's part of a queue; key_id is empty for what needed no key."""

    __tablename__ = "lanes"

    model: Mapped[str] = mapped_column(Text, primary_key=True)
    priority: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str] = mapped_column(Text, primary_key=True)
    key_id: Mapped[str] = mapped_column(Text, primary_key=True, server_default=text("''"))
    jobs: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    clock: Mapped[float] = mapped_column(
        Double, server_default=text("0")
    )  # virtual time of its next turn


class LaneDelta(Base):
    """A change of a lane that is not in `lanes` yet."""

    __tablename__ = "lane_deltas"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    model: Mapped[str] = mapped_column(Text)
    priority: Mapped[str] = mapped_column(Text)
    tenant: Mapped[str] = mapped_column(Text)
    key_id: Mapped[str] = mapped_column(Text, server_default=text("''"))
    jobs: Mapped[int] = mapped_column(Integer)
    tokens: Mapped[int] = mapped_column(BigInteger)
