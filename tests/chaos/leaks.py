"""A leak run: thousands of small jobs, then memory, connections, handles, threads and Redis's keys
must be where they were.

The load comes in waves. After each the clients are silent until everything settled, and every
process is looked at. The first waves fill caches and pools, and what is allowed to grow has grown;
from the baseline on nothing may, beyond what is said here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import psycopg
import redis
from rich.console import Console
from rich.table import Table

from tests.chaos import audit, checker
from tests.chaos.client import Clients
from tests.chaos.load import Load
from tests.chaos.receiver import Receiver
from tests.chaos.records import History
from tests.chaos.run import make_tenants
from tests.chaos.stack import MODEL, Stack

WARM_WAVES = 2
IDLE_SECONDS = (
    8.0  # after a wave: connections that were borrowed are back, short-lived keys are gone
)
EVENT_SECONDS = 5  # how long a job's events stay in Redis here; ten minutes by default
ALLOWED = {  # growth from the baseline to the end, of one process
    "memory_mb": 24.0,  # allocators keep some; a leak of a kilobyte a job would show
    "files": 6.0,
    "sockets": 8.0,  # pools open what the largest wave needed
    "threads": 4.0,
    "keys": 12.0,
    "connections": 12.0,
}
_ID = re.compile(r"(?<=[_:.])[0-9a-z]{26}|[0-9a-f]{8}-[0-9a-f-]{27}|\d{4,}")
Look = Mapping[str, Mapping[str, float]]  # by process: what it holds


@dataclass(frozen=True, slots=True)
class Growth:
    who: str
    what: str
    baseline: float
    end: float
    allowed: float

    @property
    def leaks(self) -> bool:
        return self.end - self.baseline > self.allowed


def growth(looks: Sequence[Look]) -> list[Growth]:
    """From the baseline, the first after the warm waves, to the lowest of the last two: a wave's
    own noise is no leak.
    """
    baseline, last = looks[WARM_WAVES - 1], looks[-2:]
    found = []
    for who, held in looks[-1].items():
        for what in held:
            end = min(look[who].get(what, 0.0) for look in last)
            allowed = next(most for name, most in ALLOWED.items() if name in what)
            found.append(Growth(who, what, baseline[who].get(what, 0.0), end, allowed))
    return found


def look(stack: Stack) -> Look:
    found: dict[str, dict[str, float]] = {}
    for name, slot in stack.slots.items():
        assert slot.process is not None
        process = psutil.Process(slot.process.pid)
        with process.oneshot():
            found[name] = {
                "memory_mb": round(process.memory_info().rss / 1e6, 1),
                "files": float(process.num_fds() - len(process.net_connections())),
                "sockets": float(len(process.net_connections())),
                "threads": float(process.num_threads()),
            }
    found["Redis"] = _redis(stack.redis_url)
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'vdiff'"
        ).fetchone()
    assert row is not None
    found["PostgreSQL"] = {"connections": float(row[0])}
    return found


def _redis(url: str) -> dict[str, float]:
    """Its clients, and its keys by kind: a job's or a worker's id left out, and whether they go by
    themselves.
    """
    client = redis.Redis.from_url(url)
    try:
        kinds: Counter[str] = Counter()
        for key in client.scan_iter(count=1000):
            lasting = "" if client.ttl(key) >= 0 else "lasting "
            kinds[f"{lasting}keys {_ID.sub('*', key.decode())}"] += 1
        return {
            "connections": float(client.info("clients")["connected_clients"]),
            **{k: float(n) for k, n in kinds.items()},
        }
    finally:
        client.close()


def settle(stack: Stack, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while any(audit.open_work(stack.database_url)):
        if time.monotonic() > deadline:
            raise RuntimeError(
                "jobs or deliveries are still open; `python -m tests.chaos --faults 0` says which"
            )
        time.sleep(0.5)
    time.sleep(IDLE_SECONDS)


def run(
    waves: int, jobs: int, concurrency: int, seed: int, console: Console
) -> tuple[list[Look], list[checker.Violation]]:
    history, looks = History(), list[Look]()
    with Stack(settings={"event_stream_seconds": EVENT_SECONDS}) as stack:
        receiver = Receiver(history, seed)
        stack.background.run(receiver.start())
        clients = Clients(stack.api_urls(), history)
        try:
            tenants = make_tenants(stack, history, receiver)
            for wave in range(waves):
                load = Load(
                    clients,
                    tenants,
                    model=MODEL,
                    seed=seed + wave,
                    jobs=jobs,
                    concurrency=concurrency,
                    receiver_url=receiver.url,
                )
                began = time.monotonic()
                working = asyncio.run_coroutine_threadsafe(load.run(), stack.background.loop)
                working.result(3600)
                settle(stack)
                looks.append(look(stack))
                shown = ", ".join(
                    f"{who} {held['memory_mb']:.0f} MB"
                    for who, held in looks[-1].items()
                    if "memory_mb" in held
                )
                console.print(
                    f"wave {wave + 1}/{waves}: {jobs} jobs, {time.monotonic() - began:.0f} s; {shown}",
                    highlight=False,
                )
            database = audit.read(stack.database_url)
        finally:
            clients.stopping = True
            stack.background.run(clients.close())
            stack.background.run(receiver.close())
        if stack.unplanned:
            raise RuntimeError(f"a process ended by itself: {stack.unplanned}")
    return looks, checker.check(history, database)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.leaks", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--waves", type=int, default=6, help=f"at least {WARM_WAVES + 2} [%(default)s]"
    )
    parser.add_argument("--jobs", type=int, default=500, help="of each wave [%(default)s]")
    parser.add_argument("--concurrency", type=int, default=32, help="clients at once [%(default)s]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every look there")
    given = parser.parse_args(arguments)
    if given.waves < WARM_WAVES + 2 or given.jobs < 1 or given.concurrency < 1:
        parser.error(
            f"--waves must be at least {WARM_WAVES + 2}, --jobs and --concurrency at least 1"
        )
    console = Console()
    try:
        looks, violations = run(given.waves, given.jobs, given.concurrency, given.seed, console)
    except KeyboardInterrupt:
        console.print("stopped; every process was ended, nothing was judged")
        return 130
    found = growth(looks)
    table = Table(
        "process",
        "what",
        f"after wave {WARM_WAVES}",
        f"after wave {given.waves}",
        "growth",
        "allowed",
    )
    for one in found:
        grew = f"{one.end - one.baseline:+g}"
        table.add_row(
            one.who,
            one.what,
            f"{one.baseline:g}",
            f"{one.end:g}",
            f"[red]{grew}[/red]" if one.leaks else grew,
            f"{one.allowed:g}",
        )
    console.print(table)
    for violation in violations:
        console.print(
            f"{violation.rule}: {violation.subject} {violation.what}",
            style="red",
            highlight=False,
            markup=False,
        )
    if given.json is not None:
        given.json.write_text(
            json.dumps({"looks": looks, "growth": [asdict(one) for one in found]}, indent=1) + "\n"
        )
    return 1 if violations or any(one.leaks for one in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
