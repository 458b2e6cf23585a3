"""The findings of a run, as tables for people and as JSON for machines."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import RULES, Violation
from tests.chaos.records import TERMINAL, Database, FaultDone, History

SHOWN_PER_RULE = 5


@dataclass(slots=True)
class Report:
    seed: int
    command: str
    seconds: float
    jobs: dict[str, int]  # by outcome
    lives: int
    attempts: dict[str, int]  # by outcome
    ways: dict[str, int]  # accepted answers, by how they were asked for
    faults: dict[str, int]
    recovery_seconds: dict[
        str, list[float]
    ]  # by kind of fault: from its end to the first job that succeeded after it
    given_back_seconds: list[
        float
    ]  # from a kill -9 of a worker until each job that it held was queued again, or over
    taken_up_seconds: list[float]  # and until it ran again: what was queued before it counts too
    webhooks: dict[str, int]
    answers: dict[str, int]
    unplanned: list[str]
    checked: dict[str, int]
    violations: list[Violation] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "violations": [asdict(v) for v in self.violations]}


def make_report(
    history: History,
    database: Database,
    violations: Sequence[Violation],
    *,
    seed: int,
    command: str,
    seconds: float,
    unplanned: Sequence[str],
) -> Report:
    recovery: dict[str, list[float]] = defaultdict(list)
    succeeded = sorted(move.at for move in database.moves if move.after == "succeeded")
    for fault in history.faults:
        after = next((at for at in succeeded if at > fault.ended_at), None)
        if after is not None:
            recovery[fault.kind].append(round(after - fault.ended_at, 3))
    events = Counter("none" if r.answered is None else str(r.answered) for r in history.received)
    return Report(
        seed=seed,
        command=command,
        seconds=round(seconds, 1),
        jobs=dict(Counter(row.status for row in database.jobs.values())),
        lives=sum(row.life for row in database.jobs.values()),
        attempts=dict(Counter(attempt.outcome for attempt in database.attempts)),
        ways=dict(Counter(accepted.how for accepted in history.accepted)),
        faults=dict(Counter(fault.kind for fault in history.faults)),
        recovery_seconds=dict(recovery),
        given_back_seconds=held_by_the_dead(history.faults, database, {"queued", *TERMINAL}),
        taken_up_seconds=held_by_the_dead(history.faults, database, {"running", *TERMINAL}),
        webhooks={
            "requests": len(history.received),
            **{f"answered {code}": n for code, n in sorted(events.items())},
            "events": len({r.headers.get("webhook-id") for r in history.received}),
        },
        answers=dict(sorted(history.answers.items())),
        unplanned=list(unplanned),
        checked={
            "answers that showed a job": len(history.seen),
            "cancels": len(history.cancels),
            "retries": len(history.retries),
            "streams": len(history.streams),
            "batches": len(history.batches),
            "batch lines": sum(len(b.requests) for b in history.batches),
            "requests for another's job": len(history.foreign),
            "moves": len(database.moves),
        },
        violations=list(violations),
    )


def held_by_the_dead(
    faults: Sequence[FaultDone], database: Database, until: Collection[str]
) -> list[float]:
    """Return the seconds until the jobs that a killed worker held were in one of these states."""
    moves = defaultdict(list)
    for move in database.moves:
        moves[move.job_id].append(move)
    waits = []
    for fault in faults:
        if fault.kind != "kill -9 worker" or fault.pid is None:
            continue
        ids = database.worker_pids.get(fault.pid, ())
        for mine in moves.values():
            held = [m for m in mine if m.at < fault.began_at]
            if held and held[-1].after == "running" and held[-1].worker_id in ids:
                again = next((m for m in mine if m.at > fault.began_at and m.after in until), None)
                if again is not None:
                    waits.append(round(again.at - fault.began_at, 2))
    return sorted(waits)


def show(report: Report, console: Console) -> None:
    faults = Table(
        "fault", "times", "recovery, median s", "worst s", title="Faults", title_justify="left"
    )
    for kind, times in sorted(report.faults.items()):
        waits = report.recovery_seconds.get(kind, [])
        row = (f"{statistics.median(waits):.2f}", f"{max(waits):.2f}") if waits else ("", "")
        faults.add_row(kind, str(times), *row)
    faults.add_section()
    faults.add_row("all", str(sum(report.faults.values())), "", "")
    console.print(faults)
    jobs = Table("jobs", "number", title="Jobs by outcome", title_justify="left")
    for status in sorted(report.jobs):
        jobs.add_row(status, str(report.jobs[status]))
    jobs.add_section()
    jobs.add_row("all", str(sum(report.jobs.values())))
    jobs.add_row("lives", str(report.lives))
    for outcome, number in sorted(report.attempts.items()):
        jobs.add_row(f"attempts {outcome}", str(number))
    console.print(jobs)
    judged = Table("what was judged", "number", title="Judged", title_justify="left")
    for name, number in {
        **report.checked,
        **{f"webhooks: {k}": v for k, v in report.webhooks.items()},
    }.items():
        judged.add_row(name, str(number))
    console.print(judged)
    if report.given_back_seconds:
        back, again = report.given_back_seconds, report.taken_up_seconds
        console.print(
            f"{len(back)} jobs were held by workers that were killed. Median and worst: queued again after "
            f"{statistics.median(back):.1f} and {back[-1]:.1f} s, begun again after "
            f"{statistics.median(again):.1f} and {again[-1]:.1f} s.",
            highlight=False,
        )
    odd = {name: n for name, n in report.answers.items() if name.startswith("unexpected")}
    if odd:
        console.print(f"Odd answers, not violations: {odd}", highlight=False)
    console.print(
        "Answers: "
        + ", ".join(f"{n} x {name}" for name, n in report.answers.items() if name not in odd),
        highlight=False,
    )
    for line in report.unplanned:
        console.print(f"Ended by itself: {line}", highlight=False, markup=False)
    verdict = Table("rule", "violations", title="Verdict", title_justify="left")
    broken = Counter(violation.rule for violation in report.violations)
    for rule in RULES:
        verdict.add_row(rule, f"[red]{broken[rule]}[/red]" if broken[rule] else "0")
    console.print(verdict)
    shown: Counter[str] = Counter()
    for violation in report.violations:
        shown[violation.rule] += 1
        if shown[violation.rule] <= SHOWN_PER_RULE:
            console.print(
                f"{violation.rule}: {violation.subject} {violation.what}",
                style="red",
                highlight=False,
                markup=False,
            )
    console.print(f"seed {report.seed}, {report.seconds:.0f} s: {report.command}", highlight=False)
