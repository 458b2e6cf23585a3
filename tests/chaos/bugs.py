"""Bugs to plant into the children, one at a time, and which rule of the checker has to complain.
Never part of the product.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bug:
    what: str
    rules: frozenset[str]  # one of these must be broken
    plant: Callable[[], None] = lambda: None  # in every process, before it starts
    statements: tuple[str, ...] = ()  # in the database


def _no_fence() -> None:
    """A worker ends a job whether it still holds it or not, and never hears that it lost it."""
    from shared.jobs import repository
    from worker.held import Held, StopReason

    repository._one_held = lambda job_id, attempt, target: (repository.JOBS.c.id == job_id,)
    stop = Held.stop

    def deaf(self: Held, reason: StopReason) -> bool:
        return False if reason is StopReason.LOST else stop(self, reason)

    Held.stop = deaf  # type: ignore[method-assign]


def _no_cancel() -> None:
    """The API answers a cancel and forgets it."""
    from sqlalchemy import select

    from shared.jobs import repository, service

    jobs = repository.JOBS.c

    def forgotten(*which: Any) -> Any:
        return select(jobs.id, jobs.status).where(*which, jobs.status.in_(("queued", "running")))

    async def nothing(*_: Any, **__: Any) -> None:
        return None

    repository.cancel_where = forgotten
    for name in ("publish_cancel", "publish_done"):
        setattr(service, name, nothing)


def _no_tenants() -> None:
    """Whoever knows an id sees the job."""
    from shared.jobs import queries

    queries.get = lambda job_id, tenant: queries.select(*queries.PUBLIC).where(  # type: ignore[attr-defined]
        queries.JOBS.c.id == job_id  # type: ignore[attr-defined]
    )


def _no_idempotency() -> None:
    """The header is not kept with the job."""
    from shared.jobs.service import JobService

    complete = JobService.complete

    def forgetful(self: Any, *args: Any) -> Any:
        prepared = complete(self, *args)
        prepared.values["idempotency_key"] = None
        return prepared

    JobService.complete = forgetful  # type: ignore[assignment,method-assign]


def _no_seed() -> None:
    """An attempt draws a seed of its own."""
    import random

    from shared.sampling_params import SamplingParams

    from_json = SamplingParams.from_json.__func__  # type: ignore[attr-defined]
    SamplingParams.from_json = classmethod(
        lambda cls, value: from_json(cls, {**value, "seed": random.getrandbits(32)})
    )  # type: ignore[assignment]


def _no_truth() -> None:
    """/health says ok whatever its servers answer."""
    from shared.health import HealthProbe

    async def well(self: HealthProbe) -> None:
        return None

    HealthProbe.database = well  # type: ignore[method-assign]
    HealthProbe.redis = well  # type: ignore[method-assign]


def _no_maintenance_in_apis() -> None:
    """Only workers expire jobs."""
    from api.maintenance import MaintenanceProcess

    MaintenanceProcess.start = lambda self: None  # type: ignore[method-assign]


def _deaf() -> None:
    """A worker's consumer waits for ever once Redis has refused it something."""
    from celery.worker.state import maybe_shutdown

    from worker.consumer import _Consumer

    wait = _Consumer._wait_for_redis

    def deaf(self: _Consumer) -> None:
        while self._pause_seconds:
            maybe_shutdown()
            self.pulse.turn()
            time.sleep(0.1)
        wait(self)

    _Consumer._wait_for_redis = deaf  # type: ignore[method-assign]


def _quits() -> None:
    """A worker ends when Redis refuses it something."""
    from worker.consumer import _Consumer

    _Consumer._note = lambda self, exc: os._exit(1)  # type: ignore[method-assign]


BUGS = {
    "fence": Bug(
        "a worker that lost its job ends it all the same",
        frozenset({"ends once per life", "ends stay"}),
        _no_fence,
    ),
    "outbox": Bug(
        "moves write no events",
        frozenset({"events arrive"}),
        statements=(
            "DROP TRIGGER webhook_outbox_update ON jobs",
            "DROP TRIGGER webhook_outbox_insert ON jobs",
        ),
    ),
    "cancels": Bug(
        "a cancel is answered and forgotten", frozenset({"cancels are heeded"}), _no_cancel
    ),
    "tenants": Bug("a job is shown to any key", frozenset({"tenants are apart"}), _no_tenants),
    "idempotency": Bug(
        "the Idempotency-Key is not kept", frozenset({"one key, one job"}), _no_idempotency
    ),
    "suspects": Bug(
        "lost jobs run together again, and every loss counts against each of them",
        frozenset({"neighbours succeed"}),
        statements=(
            "CREATE FUNCTION chaos.alone() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.alone := true; RETURN NEW; END'",
            "CREATE TRIGGER chaos_alone BEFORE INSERT ON attempts FOR EACH ROW EXECUTE FUNCTION chaos.alone()",
            "CREATE FUNCTION chaos.together() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN NEW.isolation := NULL; RETURN NEW; END'",
            "CREATE TRIGGER chaos_together BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION chaos.together()",
        ),
    ),
    "health": Bug("/health is always ok", frozenset({"health tells the truth"}), _no_truth),
    "maintenance": Bug(
        "deadlines pass unnoticed while no worker lives",
        frozenset({"deadlines are kept"}),
        _no_maintenance_in_apis,
    ),
    "deaf": Bug(
        "a worker takes nothing after an outage of Redis",
        frozenset({"outages leave nobody deaf", "accepted jobs end"}),
        _deaf,
    ),
    "quits": Bug("a worker ends when Redis refuses it", frozenset({"outages end nobody"}), _quits),
    "seeds": Bug(
        "each attempt draws its own seed", frozenset({"same request, same text"}), _no_seed
    ),
}
