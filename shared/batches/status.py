"""The states of a batch, OpenAI's.

    create (API)
      ▼                 every line is good
    validating ──────────────────────────► in_progress ──────► finalizing ──┬─► completed
      │    │                                │      no line is open           ├─► expired     the
      window ended before │    └────────── cancel (API) ───────►├──► cancelling ──► finalizing ──┴─►
      cancelled   somebody asked for it ▼                                     ▼
    failed   a line is bad, no line ran    failed   its input became unreadable

    completed, expired, cancelled ──► in_progress      retry_failed (API)

All other moves are the caretaker's (`shared.batches.caretaker`).
"""

from __future__ import annotations

from enum import StrEnum


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OVER = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
