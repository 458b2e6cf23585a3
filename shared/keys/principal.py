"""The caller of a request: its tenant, scopes and limits. `api.auth` makes it; everything that
reads or writes takes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

ANONYMOUS = "anonymous"  # the tenant of whoever needs no key, and of the operator's own key


class Scope(StrEnum):
    JOBS = "jobs"  # jobs, and OpenAI's endpoints, which are jobs
    BATCHES = "batches"  # files and batches
    WEBHOOKS = "webhooks"  # webhook endpoints and deliveries
    ADMIN = "admin"  # everything, the tenant's keys, and what concerns the server itself (metrics)


DEFAULT_SCOPES = (Scope.JOBS, Scope.BATCHES, Scope.WEBHOOKS)


@dataclass(frozen=True, slots=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    queued_jobs: int | None = None
    queued_tokens: int | None = None

    @property
    def of_queue(self) -> bool:
        """Return whether the key's queue is limited."""
        return self.queued_jobs is not None or self.queued_tokens is not None

    def beyond(self, *, jobs: int, tokens: int, queued_jobs: int, queued_tokens: int) -> str | None:
        """Return which limit so many more queued jobs and tokens would exceed; None if none."""
        for what, now, more, limit in (
            ("jobs", queued_jobs, jobs, self.queued_jobs),
            ("tokens", queued_tokens, tokens, self.queued_tokens),
        ):
            if limit is not None and now + more > limit:
                return f"{now} {what} are queued, this would add {more}, and {limit} may be; wait until some are done"
        return None


@dataclass(frozen=True, slots=True)
class Principal:
    """One caller. Tenants see their own things and nobody else's, administrators included."""

    tenant: str
    scopes: frozenset[str]
    limits: Limits = field(default_factory=Limits)
    key_id: str | None = None  # None: no key was needed, or the operator's static one
    operator: bool = False  # holds VDIFF_API_KEY

    @property
    def payer(self) -> str:
        """The key as the tables know it: empty where there is none."""
        return self.key_id or ""

    @property
    def sees_all(self) -> bool:
        """Return whether the caller may see figures of all tenants: the operator, or anyone on
        loopback without keys.
        """
        return self.operator or (self.tenant == ANONYMOUS and self.may(Scope.ADMIN))

    def scoped(self, idempotency_key: str | None) -> str | None:
        """An idempotency key as it is stored. Two keys of a tenant may choose the same one and mean
        two jobs.
        """
        return (
            idempotency_key
            if idempotency_key is None or not self.key_id
            else f"{self.key_id} {idempotency_key}"
        )

    @property
    def reads_results(self) -> bool:
        """Return whether the caller may read the results of every job of its tenant."""
        return self.may(Scope.JOBS)

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes
