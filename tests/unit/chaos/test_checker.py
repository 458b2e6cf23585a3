"""The chaos suite's judge: says nothing about a good history, and names each thing that is wrong
with a bad one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import CANCEL_SECONDS, RULES, check
from tests.chaos.plan import KINDS, make_plan
from tests.chaos.records import (
    Accepted,
    AttemptRow,
    BatchEnded,
    CancelAnswered,
    Database,
    Death,
    FaultDone,
    Foreign,
    HealthSeen,
    History,
    JobRow,
    Listed,
    Move,
    Received,
    RetryAsked,
    Seen,
    Streamed,
)

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
RESULT = {"choices": [{"text": "yes"}], "usage": USAGE}


class World:
    """A history and a database that one may spoil. Two jobs: `a` succeeded and is watched, `c` was
    cancelled and retried.
    """

    def __init__(self) -> None:
        self.jobs = {"a": row("a"), "c": row("c", life=2, attempt=2)}
        self.moves = [
            Move(1, 1.0, "a", 1, 0, None, "queued", None),
            Move(2, 2.0, "a", 1, 1, "queued", "running", "w"),
            Move(3, 3.0, "a", 1, 1, "running", "succeeded", "w"),
            Move(4, 4.0, "c", 1, 0, None, "queued", None),
            Move(5, 5.0, "c", 1, 1, "queued", "running", "w"),
            Move(6, 6.0, "c", 1, 1, "running", "cancelled", "w"),
            Move(7, 7.0, "c", 2, 1, "cancelled", "queued", None),
            Move(8, 8.0, "c", 2, 2, "queued", "running", "w"),
            Move(9, 9.0, "c", 2, 2, "running", "succeeded", "w"),
        ]
        self.attempts = [
            AttemptRow("a", 1, 1, "succeeded"),
            AttemptRow("c", 1, 1, "cancelled"),
            AttemptRow("c", 2, 2, "succeeded"),
        ]
        self.history = History(
            accepted=[accepted("a", idempotency_key="k", hooks=("job.succeeded",)), accepted("c")],
            seen=[
                seen("a", 3.5),
                seen("c", 6.5, status="cancelled", text=None),
                seen("c", 9.5, life=2),
            ],
            cancels=[CancelAnswered(5.5, 5.6, "c", 1, "running")],
            retries=[RetryAsked(7.0, "c", 202)],
            streams=[Streamed("a", "yes", True), Streamed("c", "ye", False)],
            foreign=[Foreign("t2", "GET /v1/jobs/a", 404)],
            listed=[Listed("t", ("a", "c"))],
            received=[received("evt_1", "a", "job.succeeded", 3)],
            secrets={"own/t": SECRET},
        )
        self.pending = 0

    def found(self) -> set[str]:
        database = Database(self.jobs, tuple(self.moves), tuple(self.attempts), self.pending, {})
        return {violation.rule for violation in check(self.history, database)}


def row(job_id: str, **more: Any) -> JobRow:
    values: dict[str, Any] = {
        "id": job_id,
        "tenant": "t",
        "status": "succeeded",
        "life": 1,
        "attempt": 1,
        "max_attempts": 3,
        "cancel_requested": False,
        "idempotency_key": None,
        "batch_id": None,
        "custom_id": None,
        "prompt_tokens": 3,
        "result": RESULT,
        "error": None,
        "usage": USAGE,
    }
    return JobRow(**{**values, **more})


def accepted(job_id: str, **more: Any) -> Accepted:
    return Accepted(1.0, "t", job_id, "sign", 2, True, "plain", **more)


def seen(
    job_id: str,
    at: float,
    *,
    status: str = "succeeded",
    life: int = 1,
    end: str = "e",
    text: str | None = "yes",
) -> Seen:
    return Seen(at - 0.1, at, "t", job_id, life, status, end, text, None)


def received(
    event: str,
    job_id: str,
    kind: str,
    sequence: int,
    *,
    answered: int | None = 200,
    at: float = 100.0,
) -> Received:
    data = {"id": job_id, "status": kind.removeprefix("job."), "sequence": sequence}
    body = json.dumps({"id": event, "type": kind, "data": data}).encode()
    signed = f"{event}.{at:.0f}.".encode() + body
    signature = base64.b64encode(hmac.new(b"s" * 32, signed, hashlib.sha256).digest()).decode()
    headers = {
        "webhook-id": event,
        "webhook-timestamp": f"{at:.0f}",
        "webhook-signature": f"v1,{signature}",
    }
    return Received(at, "own/t", headers, body, answered)


def test_nothing_is_said_of_a_good_history() -> None:
    assert World().found() == set()


Spoil = Callable[[World], None]


def _batch(world: World, **more: Any) -> None:
    shown = {
        "status": "completed",
        "request_counts": {"completed": 1, "failed": 0},
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    world.jobs["b"] = row("b", batch_id="batch", custom_id="x")
    world.moves += [
        replace(m, n=m.n + 100, job_id="b", before=m.before) for m in world.moves if m.job_id == "a"
    ]
    world.attempts.append(AttemptRow("b", 1, 1, "succeeded"))
    line = {"custom_id": "x", "response": {"body": RESULT}}
    values: dict[str, Any] = {"shown": shown, "output": (line,), "errors": (), **more}
    world.history.batches.append(BatchEnded("t", "batch", {"x": "sign"}, **values))


def test_nothing_is_said_of_a_good_batch() -> None:
    world = World()
    _batch(world)
    assert world.found() == set()


def _killer(world: World, status: str) -> None:
    world.history.accepted.append(accepted("a", kills=True))
    world.jobs["a"] = replace(world.jobs["a"], status=status)


def _neighbour(world: World) -> None:
    """Fail `a` after two losses: one beside `c`, one alone."""
    lost = {
        "status": "failed",
        "error": {"code": "worker_lost"},
        "result": None,
        "usage": None,
        "max_attempts": 2,
    }
    world.jobs["a"] = row("a", **lost)
    world.moves = [
        Move(1, 1.0, "a", 1, 0, None, "queued", None),
        Move(2, 2.0, "a", 1, 1, "queued", "running", "w"),
        Move(3, 2.5, "c", 1, 0, None, "queued", None),
        Move(4, 2.6, "c", 1, 1, "queued", "running", "w"),
        Move(5, 3.0, "a", 1, 1, "running", "queued", None),
        Move(6, 3.1, "c", 1, 1, "running", "succeeded", "w"),
        Move(7, 4.0, "a", 1, 2, "queued", "running", "v"),
        Move(8, 5.0, "a", 1, 2, "running", "failed", "v"),
    ]
    world.attempts = [
        AttemptRow("a", 1, 1, "lost"),
        AttemptRow("a", 2, 1, "lost"),
        AttemptRow("c", 1, 1, "succeeded"),
    ]


def test_only_losses_alone_count_against_a_job() -> None:
    world = World()
    _neighbour(world)
    world.jobs["a"] = replace(world.jobs["a"], max_attempts=1)
    assert "neighbours succeed" not in world.found()


def _death(world: World, kind: str) -> None:
    world.history.faults.append(FaultDone(kind, "Redis", 100.0, 105.0))
    world.history.deaths.append(Death("worker-0", 1, 103.0, 60.0))


def test_a_thread_that_raises_explains_a_death() -> None:
    world = World()
    _death(world, "a background thread raises")
    assert world.found() == set()


def _waits(world: World, *, busy: str) -> None:
    """Leave `q` in the queue for the whole time after an outage that ended at 100."""
    world.history.faults.append(FaultDone("Redis is full", "Redis", 98.0, 100.0))
    world.jobs |= {"q": row("q"), "long": row("long")}
    world.moves += [
        Move(20, 90.0, "q", 1, 0, None, "queued", None),
        Move(21, 90.0, "long", 1, 0, None, "queued", None),
        Move(22, 91.0, "long", 1, 1, "queued", "running", "deaf"),
    ]
    if busy == "deaf":
        world.jobs["n"] = row("n")
        world.moves += [
            Move(23, 99.0, "n", 1, 0, None, "queued", None),
            Move(24, 101.0, "n", 1, 1, "queued", "running", "hears"),
            Move(25, 102.0, "n", 1, 1, "running", "succeeded", "hears"),
        ]
        world.attempts.append(AttemptRow("n", 1, 1, "succeeded"))
    world.moves += [
        Move(26, 120.0, "q", 1, 1, "queued", "running", "hears"),
        Move(27, 121.0, "q", 1, 1, "running", "succeeded", "hears"),
        Move(28, 122.0, "long", 1, 1, "running", "succeeded", "deaf"),
    ]
    world.attempts += [AttemptRow("q", 1, 1, "succeeded"), AttemptRow("long", 1, 1, "succeeded")]


def _late(world: World, expired_at: float) -> None:
    world.history.accepted.append(replace(accepted("d"), start_by=100.0))
    world.jobs["d"] = row("d", status="expired", attempt=0, result=None, usage=None)
    world.moves += [
        Move(30, 99.0, "d", 1, 0, None, "queued", None),
        Move(31, expired_at, "d", 1, 0, "queued", "expired", None),
    ]


def test_a_deadline_that_is_kept_is_fine_and_an_outage_of_the_database_excuses_it() -> None:
    world = World()
    _late(world, 102.0)
    assert world.found() == set()
    world = World()
    _late(world, 112.0)
    world.history.faults.append(FaultDone("SIGSTOP PostgreSQL", "PostgreSQL", 99.0, 105.0))
    assert world.found() == set()


def _health(world: World, at: float, *, redis_ok: bool) -> None:
    world.history.faults.append(FaultDone("Redis is full", "Redis", 100.0, 110.0))
    world.history.health.append(HealthSeen(at, at + 0.1, "api", True, redis_ok))


SPOILED: list[tuple[str, Spoil]] = [
    ("accepted jobs end", lambda w: w.history.accepted.append(accepted("lost"))),
    ("accepted jobs end", lambda w: w.jobs.update(a=row("a", tenant="t2"))),
    ("accepted jobs end", lambda w: w.jobs.update(a=row("a", status="running", result=None))),
    (
        "ends once per life",
        lambda w: w.moves.append(Move(10, 10.0, "a", 1, 1, "succeeded", "succeeded", "w")),
    ),
    (
        "ends once per life",
        lambda w: w.moves.append(Move(10, 10.0, "a", 1, 1, "succeeded", "queued", None)),
    ),
    (
        "ends once per life",
        lambda w: w.moves.append(Move(10, 10.0, "a", 1, 1, "succeeded", "deleted", None)),
    ),
    ("ends once per life", lambda w: w.moves.pop(1)),  # queued -> succeeded
    ("ends once per life", lambda w: w.history.retries.clear()),
    ("ends once per life", lambda w: w.attempts.append(AttemptRow("a", 2, 1, "cancelled"))),
    ("ends once per life", lambda w: w.attempts.append(AttemptRow("a", 2, 1, "running"))),
    ("ends stay", lambda w: w.history.seen.append(seen("a", 20.0, end="other"))),
    ("ends stay", lambda w: w.history.seen.append(seen("a", 20.0, status="running", end=""))),
    (
        "ends stay",
        lambda w: w.history.seen.append(seen("c", 20.0, status="cancelled", text=None)),
    ),  # life 1 after life 2
    (
        "ends stay",
        lambda w: w.jobs.update(a=row("a", result={**RESULT, "choices": [{"text": "no"}]})),
    ),
    (
        "cancelled stays cancelled",
        lambda w: w.history.seen.append(seen("a", 3.4, status="cancelled")),
    ),
    (
        "cancels are heeded",
        lambda w: w.history.cancels.append(CancelAnswered(1.4, 1.5, "a", 1, "queued")),
    ),
    (
        "failures have reasons",
        lambda w: w.jobs.update(a=row("a", status="failed", error={"code": "job_quarantined"})),
    ),
    ("tenants are apart", lambda w: w.history.foreign.append(Foreign("t2", "GET /v1/jobs/a", 200))),
    ("tenants are apart", lambda w: w.history.listed.append(Listed("t2", ("a",)))),
    ("one key, one job", lambda w: w.history.accepted.append(accepted("c", idempotency_key="k"))),
    ("one key, one job", lambda w: w.jobs.update(d=row("d", idempotency_key="k"))),
    (
        "same request, same text",
        lambda w: w.jobs.update(a=row("a", result={**RESULT, "choices": [{"text": "no"}]})),
    ),
    ("streams tell the text", lambda w: w.history.streams.append(Streamed("a", "no", False))),
    ("streams tell the text", lambda w: w.history.streams.append(Streamed("a", "ye", True))),
    ("usage adds up", lambda w: w.jobs.update(a=row("a", usage={**USAGE, "total_tokens": 6}))),
    ("usage adds up", lambda w: w.jobs.update(a=row("a", prompt_tokens=4))),
    (
        "usage adds up",
        lambda w: _batch(
            w, shown={"status": "completed", "request_counts": {"completed": 1, "failed": 0}}
        ),
    ),
    ("batches have every line", lambda w: _batch(w, output=())),
    (
        "batches have every line",
        lambda w: _batch(w, output=({"custom_id": "x", "response": {"body": {}}},)),
    ),
    ("neighbours succeed", lambda w: _killer(w, "succeeded")),
    ("neighbours succeed", lambda w: _neighbour(w)),
    ("outages end nobody", lambda w: w.history.deaths.append(Death("deliver", 0, 50.0, 40.0))),
    ("outages end nobody", lambda w: _death(w, "Redis is a replica")),
    ("outages leave nobody deaf", lambda w: _waits(w, busy="nobody")),
    ("outages leave nobody deaf", lambda w: _waits(w, busy="deaf")),
    ("deadlines are kept", lambda w: _late(w, 120.0)),
    ("health tells the truth", lambda w: _health(w, 104.0, redis_ok=True)),
    ("health tells the truth", lambda w: _health(w, 122.0, redis_ok=False)),
    ("events arrive", lambda w: w.history.received.clear()),
    (
        "events arrive",
        lambda w: w.history.received.__setitem__(
            0, received("evt_1", "a", "job.succeeded", 3, answered=500)
        ),
    ),
    ("events arrive", lambda w: setattr(w, "pending", 1)),
    (
        "events are true",
        lambda w: w.history.received.append(received("evt_2", "a", "job.succeeded", 3)),
    ),
    (
        "events are true",
        lambda w: w.history.received.append(received("evt_2", "a", "job.failed", 4)),
    ),
    (
        "events are true",
        lambda w: w.history.received.append(replace(w.history.received[0], receiver="redirected")),
    ),
    (
        "events are signed",
        lambda w: w.history.received.append(replace(w.history.received[0], at=1000.0)),
    ),
    (
        "events are signed",
        lambda w: w.history.secrets.update(
            {"own/t": "whsec_" + base64.b64encode(b"x" * 32).decode()}
        ),
    ),
]


@pytest.mark.parametrize(
    ("rule", "spoil"), SPOILED, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(SPOILED)]
)
def test_each_wrong_is_named(rule: str, spoil: Spoil) -> None:
    world = World()
    spoil(world)
    assert rule in world.found()


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _ in SPOILED} == set(RULES)


def test_a_cancel_has_time_to_take_effect_and_faults_are_not_counted() -> None:
    """A job that ends by itself just after its cancel broke nothing; one that went on for long did,
    unless a fault was on.
    """
    world = World()
    world.moves[2] = replace(world.moves[2], at=2.5 + CANCEL_SECONDS + 1)
    world.history.cancels.append(CancelAnswered(2.4, 2.5, "a", 1, "running"))
    assert world.found() == {"cancels are heeded"}
    world.history.faults.append(FaultDone("SIGSTOP PostgreSQL", "PostgreSQL", 3.0, 9.0))
    assert world.found() == set()


def test_a_plan_follows_from_its_seed_and_shows_every_kind() -> None:
    cards = sum(times for _, _, times in KINDS.values())
    plan = make_plan(7, jobs=1000, faults=cards)
    assert plan == make_plan(7, jobs=1000, faults=cards) != make_plan(8, jobs=1000, faults=cards)
    assert {fault.kind for fault in plan} == set(KINDS)
    assert [f.at_job for f in plan] == sorted(f.at_job for f in plan) and plan[-1].at_job <= 1000
    assert all(KINDS[f.kind][0] <= f.seconds <= KINDS[f.kind][1] for f in plan)
