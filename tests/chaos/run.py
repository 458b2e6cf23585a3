"""One run: begin the processes, let the clients and the faults loose, wait until all is quiet,
read, judge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg

from shared.db.session import Database as SyncDatabase
from shared.keys import repository as keys
from shared.keys import tokens
from shared.keys.principal import DEFAULT_SCOPES
from shared.webhooks.secrets import new_secret
from tests.chaos import audit, checker
from tests.chaos.client import Clients, Tenant
from tests.chaos.faults import Faults
from tests.chaos.load import EVENT_TYPES, Load
from tests.chaos.plan import KINDS, make_plan
from tests.chaos.receiver import Receiver
from tests.chaos.records import History
from tests.chaos.report import Report, make_report
from tests.chaos.stack import MODEL, Stack

TICK_SECONDS = 0.1
SETTLE_SECONDS = (
    180.0  # after the last fault and the last job: what is open then will not end by itself
)
TENANTS = 4
STALLED_SECONDS = 240.0  # without a job that came to its end: give up waiting and judge


@dataclass(frozen=True, slots=True)
class Options:
    jobs: int = 1_000
    faults: int = 30
    seed: int = 1
    workers: int = 2
    apis: int = 2
    concurrency: int = 32
    kinds: tuple[str, ...] = tuple(KINDS)
    bug: str | None = None
    minutes: float | None = (
        None  # after which no more jobs and faults begin; what was done is judged
    )
    logs: Path | None = None  # where the processes' logs are left

    @property
    def command(self) -> str:
        plant = f" --plant {self.bug}" if self.bug else ""
        minutes = "" if self.minutes is None else f" --minutes {self.minutes:g}"
        kinds = (
            ""
            if self.kinds == tuple(KINDS)
            else "".join(f' --only "{kind}"' for kind in self.kinds)
        )
        return (
            f"make chaos ARGS='--jobs {self.jobs} --faults {self.faults} --seed {self.seed} --workers {self.workers}"
            f" --concurrency {self.concurrency}{minutes}{kinds}{plant}'"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """The figures of the progress bar."""

    phase: str
    over: int
    jobs: int
    faults: int
    seconds: float


def run(options: Options, *, tell: Callable[[Progress], None] = lambda progress: None) -> Report:
    """Raises KeyboardInterrupt with everything ended."""
    began = time.monotonic()
    history = History()
    with Stack(
        apis=options.apis, workers=options.workers, bug=options.bug, logs=options.logs
    ) as stack:
        run_async = stack.background.run
        receiver = Receiver(history, options.seed)
        clients = Clients(stack.api_urls(), history)
        run_async(receiver.start())
        try:
            tenants = make_tenants(stack, history, receiver)
            load = Load(
                clients,
                tenants,
                model=MODEL,
                seed=options.seed,
                jobs=options.jobs,
                concurrency=options.concurrency,
                receiver_url=receiver.url,
            )
            plan = make_plan(
                options.seed, jobs=options.jobs, faults=options.faults, kinds=options.kinds
            )
            faults = Faults(stack, receiver, history, load, plan)

            def say(phase: str) -> None:
                tell(
                    Progress(phase, load.over, options.jobs, faults.done, time.monotonic() - began)
                )

            working = asyncio.run_coroutine_threadsafe(load.run(), stack.background.loop)
            watching = asyncio.run_coroutine_threadsafe(
                clients.watch_health(), stack.background.loop
            )
            try:
                _work(stack, load, faults, working, say, options.minutes)
                receiver.mode, receiver.failures = "good", 0.0
                _settle(stack, say)
            finally:
                clients.stopping = True
                faults.end_all()
                _join(working)
                _join(watching)
            database = audit.read(stack.database_url)
        finally:
            clients.stopping = True
            run_async(clients.close())
            run_async(receiver.close())
        unplanned = list(stack.unplanned)
        history.deaths = list(stack.deaths)
    violations = checker.check(history, database)
    return make_report(
        history,
        database,
        violations,
        seed=options.seed,
        command=options.command,
        seconds=time.monotonic() - began,
        unplanned=unplanned,
    )


def _work(
    stack: Stack,
    load: Load,
    faults: Faults,
    working: Future[None],
    say: Callable[[str], None],
    minutes: float | None,
) -> None:
    """Until the clients are content and all faults are over; or nothing moves any more, which the
    checker will tell.
    """
    moved_at, seen = time.monotonic(), -1_000
    ends_at = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    while not working.done() or faults.left or load.extra_open:
        if time.monotonic() > ends_at:
            load.jobs = min(load.jobs, load.begun)
            faults.begin_no_more()
        faults.tick(load.begun, hurry=working.done() or load.begun >= load.jobs)
        stack.tend()
        moved = load.over + faults.done - load.extra_open
        if moved != seen:
            moved_at, seen = time.monotonic(), moved
        if time.monotonic() - moved_at > STALLED_SECONDS:
            return
        say("jobs and faults")
        time.sleep(TICK_SECONDS)
    working.result()


def _settle(stack: Stack, say: Callable[[str], None]) -> None:
    """Until no job, delivery or batch is open, for a bounded time; what is left is the checker's to
    find.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        stack.tend()
        say("settling")
        try:
            if not any(audit.open_work(stack.database_url)):
                return
        except psycopg.OperationalError:
            pass  # it comes up again just now
        time.sleep(5 * TICK_SECONDS)


def _join(working: Future[None]) -> None:
    try:
        working.result(30)
    except (TimeoutError, asyncio.CancelledError):
        working.cancel()


def make_tenants(stack: Stack, history: History, receiver: Receiver) -> list[Tenant]:
    """Keys as `vdiff keys create` makes them; each tenant with an endpoint that wants everything
    about watched jobs.
    """
    made = []
    database = SyncDatabase(stack.database_url, pool_size=1)
    try:
        for i in range(TENANTS):
            key_id, name = tokens.new_key_id(), f"chaos-{i}"
            key = tokens.new_key(key_id)
            with database.write() as session:
                session.execute(
                    keys.create(
                        key_id,
                        name=name,
                        tenant=name,
                        key_hash=tokens.hash_key(key),
                        scopes=list(DEFAULT_SCOPES),
                        webhook_secret=new_secret(),
                        requests_per_minute=None if i else 1_000_000,
                        max_queued_jobs=None,
                        max_queued_tokens=None,
                        weight=1 + i,
                        expires_at=None,
                    )
                )
            made.append(Tenant(name, key))
    finally:
        database.dispose()
    for tenant in made:
        with httpx.Client(
            base_url=stack.api_urls()[0],
            headers={"Authorization": f"Bearer {tenant.key}"},
            timeout=30,
            trust_env=False,
        ) as client:
            own = client.get("/v1/webhook_secret").raise_for_status().json()
            history.secrets[f"own/{tenant.name}"] = own["secret"]
            body = {
                "url": f"{receiver.url}/endpoint/{tenant.name}",
                "events": list(EVENT_TYPES),
                "inline_result": True,
                "metadata_filter": {"watched": "yes"},
            }
            endpoint = client.post("/v1/webhook_endpoints", json=body).raise_for_status().json()
            history.secrets[f"endpoint/{tenant.name}"] = endpoint["secret"]
    return made
