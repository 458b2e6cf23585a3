"""The states of an evaluation, and of one of its configurations (a "run").

    create (API) ──► in_progress ──► completed    every run is over
                        │   ▲           │         at least one of them well, else failed
                        │   └───────────┤         another configuration, or what was not done yet
                                                  (API)
                cancel (API)            │
                        ▼               │
                    cancelling ──► cancelled

A run is in_progress, then completed (every answer is graded), failed (the rest of its jobs cannot
be made or run; `error` says why) or cancelled. All moves but the API's are the caretaker's
(`shared.evaluations.caretaker`).
"""

from __future__ import annotations

from enum import StrEnum


class EvaluationStatus(StrEnum):
    IN_PROGRESS = "in_progress"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RunStatus(StrEnum):
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = (EvaluationStatus.IN_PROGRESS, EvaluationStatus.CANCELLING)
