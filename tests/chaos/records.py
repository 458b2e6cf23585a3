"""The data that the checker judges: clients' observations, receivers' requests, and the rows of the
database at the end.

Times are Unix seconds of the one machine that everything runs on. `asked_at` is before the request
went out, `at` after the answer came, so `a.at < b.asked_at` means that a was known before b was
asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def text_of(result: Mapping[str, Any] | None) -> str | None:
    """The texts of all choices of a response object."""
    if not result:
        return None
    return "\n".join(
        c["message"]["content"] if "message" in c else c["text"] for c in result["choices"]
    )


@dataclass(frozen=True, slots=True)
class Accepted:
    """A client was told a job's id."""

    at: float
    tenant: str
    job_id: str
    request: str  # of everything that decides the text
    max_tokens: int
    whole: bool  # ignore_eos: exactly max_tokens are generated
    how: str
    idempotency_key: str | None = None
    hooks: tuple[str, ...] = ()  # event types that its own URL wants
    labelled: bool = False  # its tenant's endpoint wants everything about it
    start_by: float | None = None  # its deadline, Unix seconds
    kills: bool = False  # it ends each worker that runs it


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as an answer showed it."""

    asked_at: float
    at: float
    tenant: str
    job_id: str
    life: int
    status: str
    end: str  # digest of all that an end fixes; "" while it is not over
    text: str | None
    usage: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class CancelAnswered:
    asked_at: float
    at: float
    job_id: str
    life: int
    status: str


@dataclass(frozen=True, slots=True)
class RetryAsked:
    at: float
    job_id: str
    code: int | None  # None: no answer


@dataclass(frozen=True, slots=True)
class Streamed:
    """Text that a stream gave; complete when it came to [DONE] without an error."""

    job_id: str
    text: str
    complete: bool


@dataclass(frozen=True, slots=True)
class Foreign:
    """Somebody asked for another tenant's job."""

    tenant: str
    what: str
    code: int


@dataclass(frozen=True, slots=True)
class Listed:
    tenant: str
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """A batch as its owner saw it at the end, with the lines of its files."""

    tenant: str
    batch_id: str
    requests: Mapping[str, str]  # what decides a line's text, by custom_id
    shown: Mapping[str, Any]
    output: tuple[Mapping[str, Any], ...]
    errors: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Received:
    """One request that reached a receiver."""

    at: float
    receiver: str  # "own/TENANT", "endpoint/TENANT", or "redirected", where nothing may ever arrive
    headers: Mapping[str, str]
    body: bytes
    answered: int | None  # None: hung, the sender gave up


@dataclass(frozen=True, slots=True)
class FaultDone:
    kind: str
    target: str
    began_at: float
    ended_at: float
    pid: int | None = None  # of what was killed


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended by itself: no fault killed it."""

    name: str
    code: int
    at: float
    seconds: float  # it had run for


@dataclass(frozen=True, slots=True)
class HealthSeen:
    """The state of the servers according to an API's /health."""

    asked_at: float
    at: float
    api: str
    database_ok: bool
    redis_ok: bool


@dataclass(slots=True)
class History:
    accepted: list[Accepted] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    cancels: list[CancelAnswered] = field(default_factory=list)
    retries: list[RetryAsked] = field(default_factory=list)
    streams: list[Streamed] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    listed: list[Listed] = field(default_factory=list)
    batches: list[BatchEnded] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    faults: list[FaultDone] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    health: list[HealthSeen] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)  # by receiver
    answers: dict[str, int] = field(default_factory=dict)  # status codes and lost answers, counted


@dataclass(frozen=True, slots=True)
class Move:
    """One change of a job's row, as our own trigger saw it; `n` is their order."""

    n: int
    at: float
    job_id: str
    life: int
    attempt: int
    before: str | None  # None: inserted
    after: str
    worker_id: str | None


@dataclass(frozen=True, slots=True)
class JobRow:
    id: str
    tenant: str
    status: str
    life: int
    attempt: int
    max_attempts: int
    cancel_requested: bool
    idempotency_key: str | None
    batch_id: str | None
    custom_id: str | None
    prompt_tokens: int
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    usage: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    job_id: str
    attempt: int
    life: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Database:
    jobs: Mapping[str, JobRow]
    moves: tuple[Move, ...]
    attempts: tuple[AttemptRow, ...]
    pending_deliveries: int
    worker_pids: Mapping[int, tuple[str, ...]]
