"""Rules about outages, for `tests.chaos.checker`: servers that refuse, workers that die, and
health.

Pure, like the checker; imports nothing of the product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tests.chaos.records import TERMINAL, Accepted, Database, Death, FaultDone, History, Move

Found = Iterator[tuple[str, str]]

PICK_UP_SECONDS = 10.0  # after an outage has ended, for a worker to take a job that waits
DEADLINE_SECONDS = 10.0  # after a deadline, for a queued job to expire
EXPLAIN_SECONDS = 20.0  # after a fault, in which it explains that a process ends
HEALTH_GRACE_SECONDS = 3.0  # after a fault has begun, before health must know of it
SLOTS = 8  # of a worker (max_num_seqs)
KILLED = -9
LOST_CODES = frozenset({"worker_lost", "job_quarantined"})

REDIS_REFUSES = frozenset({"Redis is full", "Redis is a replica", "Redis refuses writes"})
REDIS_OUTAGES = REDIS_REFUSES | {"kill -9 Redis", "SIGSTOP Redis"}
DATABASE_OUTAGES = frozenset(
    {"PostgreSQL is read-only", "kill -9 PostgreSQL", "SIGSTOP PostgreSQL"}
)
# A process may end when PostgreSQL goes away while it starts, when its own thread fails for long,
# or when it stood still.
EXPLAINS_A_DEATH = frozenset(
    {
        "kill -9 PostgreSQL",
        "SIGSTOP PostgreSQL",
        "kill -9 a backend of PostgreSQL",
        "a background thread raises",
        "connections paused",
        "connections cut",
        "SIGSTOP worker",
        "SIGSTOP API",
        "clock of a worker wrong",
    }
)
DELAYS_A_DEADLINE = DATABASE_OUTAGES | {
    "kill -9 a backend of PostgreSQL",
    "connections paused",
    "connections cut",
    "kill -9 API",
    "SIGSTOP API",
    "a background thread raises",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt as the moves show it: from its claim until its row moved on."""

    job_id: str
    life: int
    worker_id: str
    began: float
    ended: float
    after: str | None  # None: it still ran at the end


def runs_of(database: Database) -> list[Run]:
    """Return every attempt with the span in which its worker held it."""
    runs, open_runs = [], dict[str, Move]()
    for move in sorted(database.moves, key=lambda m: m.n):
        began = open_runs.pop(move.job_id, None)
        if began is not None:
            runs.append(
                Run(move.job_id, began.life, began.worker_id or "", began.at, move.at, move.after)
            )
        if move.after == "running":
            open_runs[move.job_id] = move
    runs += [
        Run(m.job_id, m.life, m.worker_id or "", m.at, float("inf"), None)
        for m in open_runs.values()
    ]
    return runs


def lost_alone(database: Database) -> dict[tuple[str, int], int]:
    """Return, by (job, life), how many attempts were lost while their worker ran nothing else."""
    lost = {(a.job_id, a.life) for a in database.attempts if a.outcome == "lost"}
    by_worker: dict[str, list[Run]] = defaultdict(list)
    for run in runs_of(database):
        by_worker[run.worker_id].append(run)
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for runs in by_worker.values():
        for run in runs:
            if (run.job_id, run.life) not in lost or run.after not in ("queued", "failed"):
                continue
            others = (
                o for o in runs if o is not run and o.began < run.ended and run.began < o.ended
            )
            counts[run.job_id, run.life] += not any(others)
    return counts


def _killers(history: History) -> dict[str, Accepted]:
    return {accepted.job_id: accepted for accepted in history.accepted if accepted.kills}


def neighbours_succeed(history: History, database: Database) -> Found:
    """A job that kills its worker fails for it; no other job fails because it shared the batch."""
    killers, alone = _killers(history), lost_alone(database)
    for job_id in killers:
        row = database.jobs.get(job_id)
        if row is not None and row.status != "failed":
            yield job_id, f"kills its workers, and is {row.status}"
    for row in database.jobs.values():
        if (
            row.id in killers
            or row.status != "failed"
            or (row.error or {}).get("code") not in LOST_CODES
        ):
            continue
        if alone[row.id, row.life] < row.max_attempts:
            yield row.id, f"failed after {alone[row.id, row.life]} attempts that were lost alone"


def outages_end_nobody(history: History, database: Database) -> Found:
    """No process ends because a server refuses what it is sent; none ends with success unless it is
    told to end.
    """
    killed_by_jobs = bool(_killers(history))
    for death in history.deaths:
        if death.code == 0:
            yield death.name, "ended by itself with exit code 0"
        elif not (death.code == KILLED and killed_by_jobs) and not _explained(
            death, history.faults
        ):
            yield (
                death.name,
                f"ended by itself with {death.code}, {death.seconds:.0f} s after its start",
            )


def _explained(death: Death, faults: Collection[FaultDone]) -> bool:
    began = death.at - death.seconds
    for fault in faults:
        if (
            fault.kind in EXPLAINS_A_DEATH
            and fault.began_at < death.at < fault.ended_at + EXPLAIN_SECONDS
        ):
            return True
        # Started while a server refused: it may end, for its supervisor to try again.
        if (
            fault.kind in REDIS_OUTAGES | DATABASE_OUTAGES
            and fault.began_at - 1 < began < fault.ended_at + 1
        ):
            return True
    return False


def outages_leave_nobody_deaf(history: History, database: Database) -> Found:
    """Soon after an outage a worker with a free slot takes a job that waits."""
    runs = runs_of(database)
    waits = _waits_of(database)
    deaths = [death.at for death in history.deaths]
    suspects = {(a.job_id, a.life) for a in database.attempts if a.outcome == "lost"}
    for fault in history.faults:
        if fault.kind not in REDIS_OUTAGES | {"PostgreSQL is read-only"}:
            continue
        begin, end = fault.ended_at, fault.ended_at + PICK_UP_SECONDS
        quiet = not any(
            f is not fault and f.began_at < end and f.ended_at > begin for f in history.faults
        )
        if not quiet or any(begin - PICK_UP_SECONDS < at < end for at in deaths):
            continue
        waiting = [job_id for job_id, since, until in waits if since < begin and until > end]
        if not waiting:
            continue
        if not any(begin <= run.began <= end for run in runs):
            yield (
                waiting[0],
                f"waited for over {PICK_UP_SECONDS:g} s after «{fault.kind}» had ended, and no worker took any",
            )
        by_worker: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            by_worker[run.worker_id].append(run)
        for worker_id, mine in by_worker.items():
            through = [run for run in mine if run.began < begin and run.ended > end]
            there = [run for run in mine if run.began < end and run.ended > begin]
            if not through or any((run.job_id, run.life) in suspects for run in there):
                continue  # it may be dead, or run a suspect alone
            if len(there) < SLOTS and not any(begin <= run.began <= end for run in mine):
                yield (
                    worker_id,
                    f"took nothing for {PICK_UP_SECONDS:g} s after «{fault.kind}» had ended, and {waiting[0]} waited",
                )


def _waits_of(database: Database) -> list[tuple[str, float, float]]:
    """Return (job, since, until) of each span in which a job was queued."""
    waits, since = [], dict[str, float]()
    for move in sorted(database.moves, key=lambda m: m.n):
        began = since.pop(move.job_id, None)
        if began is not None:
            waits.append((move.job_id, began, move.at))
        if move.after == "queued":
            since[move.job_id] = move.at
    return waits + [(job_id, began, float("inf")) for job_id, began in since.items()]


def deadlines_are_kept(history: History, database: Database) -> Found:
    """A job that did not begin by its deadline expires soon after it, whether or not a worker
    lives.
    """
    moves: dict[str, list[Move]] = defaultdict(list)
    for move in sorted(database.moves, key=lambda m: m.n):
        moves[move.job_id].append(move)
    for accepted in history.accepted:
        if accepted.start_by is None:
            continue
        life = [m for m in moves.get(accepted.job_id, ()) if m.life == 1]
        if any(m.after == "running" and m.at <= accepted.start_by for m in life):
            continue
        late = next((m for m in life if m.at > accepted.start_by), None)
        if late is None or late.after not in TERMINAL:
            continue  # it ended before, or began in the moment of its deadline
        waited = quiet_seconds(
            history, accepted.start_by, late.at, DELAYS_A_DEADLINE, margin=DEADLINE_SECONDS
        )
        if waited > DEADLINE_SECONDS:
            yield (
                accepted.job_id,
                f"{late.after} {late.at - accepted.start_by:.1f} s after its deadline",
            )


def quiet_seconds(
    history: History,
    since: float,
    until: float,
    kinds: Collection[str] | None = None,
    *,
    margin: float,
) -> float:
    """Return how much of a span no fault (of these kinds) covers; a fault lasts `margin` seconds
    longer.
    """
    spans = sorted(
        (max(f.began_at, since), min(f.ended_at + margin, until))
        for f in history.faults
        if kinds is None or f.kind in kinds
    )
    quiet, at = 0.0, since
    for begin, end in spans:
        if end > at and begin < until:
            quiet += max(0.0, begin - at)
            at = end
    return quiet + max(0.0, until - at)


def health_tells_the_truth(history: History, database: Database) -> Found:
    """During an outage /health says so, and soon after it says ok again."""
    for fault in history.faults:
        for part, kinds in (("redis", REDIS_OUTAGES), ("database", DATABASE_OUTAGES)):
            if fault.kind not in kinds:
                continue
            for look in history.health:
                ok = look.redis_ok if part == "redis" else look.database_ok
                during = (
                    fault.began_at + HEALTH_GRACE_SECONDS < look.asked_at
                    and look.at < fault.ended_at
                )
                if during and ok:
                    yield look.api, f"said {part} ok during «{fault.kind}»"
                after = (
                    fault.ended_at + PICK_UP_SECONDS
                    < look.asked_at
                    < fault.ended_at + 2 * PICK_UP_SECONDS
                )
                quiet = after and not any(
                    f.began_at < look.at and f.ended_at > fault.ended_at and f is not fault
                    for f in history.faults
                )
                if quiet and not ok:
                    yield (
                        look.api,
                        f"said {part} is away {look.asked_at - fault.ended_at:.0f} s after «{fault.kind}»",
                    )


RULES: dict[str, Callable[[History, Database], Found]] = {
    "neighbours succeed": neighbours_succeed,
    "outages end nobody": outages_end_nobody,
    "outages leave nobody deaf": outages_leave_nobody_deaf,
    "deadlines are kept": deadlines_are_kept,
    "health tells the truth": health_tells_the_truth,
}
