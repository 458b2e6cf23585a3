"""Carries out the plan: begins each fault when its job was begun, ends it in time. Called by the
main thread alone.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import psycopg
import redis
from redis.exceptions import RedisError

from shared.queue.messages import push_sync, task_message
from shared.queue.names import GENERATE_TASK, queue_name
from tests.chaos.load import Load, Scenario
from tests.chaos.plan import Fault
from tests.chaos.receiver import Receiver
from tests.chaos.records import FaultDone, History
from tests.chaos.stack import MODEL, Slot, Stack
from vdiff.embedded import EmbeddedPostgres, EmbeddedRedis

SETTLE_SECONDS = 1.0  # between a fault that ended and the next that does not overlap
SKEWS_SECONDS = (-7200.0, -90.0, 90.0, 7200.0)
MESSAGES = 60  # that are put into Redis at once
_MODES = {
    "receiver fails": "fails",
    "receiver hangs": "hangs",
    "receiver redirects": "redirects",
    "receiver is slow": "slow",
    "receiver refuses": "refuses",
    "receiver talks nonsense": "nonsense",
    "receiver hangs up": "hangs up",
    "receiver never ends its answer": "endless",
}
BUSY_SECONDS = 0.8  # for the long jobs of a Redis fault to begin
LONG_JOBS = 2
OVERDUE_JOBS = 3
THREADS = {  # of which one raises, or all of them ("vdiff-")
    "worker": (
        "vdiff-sweeper",
        "vdiff-housekeeping",
        "vdiff-heartbeat",
        "vdiff-dispatcher",
        "vdiff-",
    ),
    "api": ("vdiff-sweeper", "vdiff-housekeeping", "vdiff-"),
    "deliver": ("vdiff-pump", "vdiff-cleaner"),
}
_READ_ONLY = "ALTER ROLE CURRENT_USER SET default_transaction_read_only = on"
_WRITABLE = "ALTER ROLE CURRENT_USER RESET default_transaction_read_only"
_END_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE usename = current_user AND pid <> pg_backend_pid()"
)


@dataclass(slots=True)
class _Running:
    fault: Fault
    target: str
    began_at: float
    pid: int | None
    end: Callable[[], None]
    due: float  # monotonic


ALL_WORKERS = "workers"
# How Redis comes to refuse what it is sent, and how that ends. Nothing listens at port 1: the
# replica never syncs.
REDIS_REFUSALS = {
    "Redis is full": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    "Redis is a replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "Redis refuses writes": (
        ("CONFIG", "SET", "min-replicas-to-write", "1"),
        ("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
}


def _conflict(one: str, other: str) -> bool:
    """Return whether two faults meet at the same target."""
    return one == other or any(
        a == ALL_WORKERS and b.startswith("worker") for a, b in ((one, other), (other, one))
    )


class Faults:
    def __init__(
        self, stack: Stack, receiver: Receiver, history: History, load: Load, plan: Sequence[Fault]
    ) -> None:
        self._stack, self._receiver, self._history, self._load = stack, receiver, history, load
        self._waiting = list(plan)
        self._running: list[_Running] = []
        self._quiet_at = 0.0
        self.done = 0

    @property
    def left(self) -> int:
        return len(self._waiting) + len(self._running)

    def tick(self, jobs_begun: int, *, hurry: bool = False) -> None:
        """End what is due, begin what is next. `hurry`: all jobs were begun, do not wait for more."""
        for running in [r for r in self._running if time.monotonic() >= r.due]:
            self._end(running)
        if not self._waiting:
            return
        fault = self._waiting[0]
        if jobs_begun < fault.at_job and not hurry:
            return
        if (self._running or time.monotonic() < self._quiet_at) and not (
            fault.overlaps and len(self._running) < 2
        ):
            return
        if any(_conflict(r.target, self._target(fault)) for r in self._running):
            return
        self._waiting.pop(0)
        self._begin(fault)

    def begin_no_more(self) -> None:
        self._waiting.clear()

    def end_all(self) -> None:
        for running in list(self._running):
            self._end(running)

    def _begin(self, fault: Fault) -> None:
        target = self._target(fault)
        began_at = time.time()
        pid, end = self._act(fault, target)
        running = _Running(
            fault, target, began_at, pid, end or (lambda: None), time.monotonic() + fault.seconds
        )
        self._running.append(running)
        if end is None:
            self._end(running)

    def _end(self, running: _Running) -> None:
        running.end()
        self._running.remove(running)
        self._quiet_at = time.monotonic() + SETTLE_SECONDS
        self._history.faults.append(
            FaultDone(
                running.fault.kind, running.target, running.began_at, time.time(), running.pid
            )
        )
        self.done += 1

    # Targets

    def _slots(self, prefix: str) -> list[Slot]:
        return [slot for name, slot in self._stack.slots.items() if name.startswith(prefix)]

    def _target(self, fault: Fault) -> str:
        kind = fault.kind
        if kind == "no worker":
            return ALL_WORKERS
        if kind == "a job kills its worker":
            return "clients"
        if kind == "a background thread raises":
            slots = [*self._slots("worker"), *self._slots("api"), *self._slots("deliver")]
            return slots[fault.which % len(slots)].name
        if "connections" in kind:
            names = list(self._stack.proxies)
            return f"{names[fault.which % len(names)]} to {('PostgreSQL', 'Redis')[fault.which // 7 % 2]}"
        for prefix, word in (("worker", "worker"), ("api", "API"), ("deliver", "deliver")):
            if word in kind:
                slots = self._slots(prefix)
                return slots[fault.which % len(slots)].name
        if "PostgreSQL" in kind:
            return "PostgreSQL"
        return "receiver" if "receiver" in kind else "Redis"

    # What each kind does: returns the pid of who was killed, and how it ends

    def _act(self, fault: Fault, target: str) -> tuple[int | None, Callable[[], None] | None]:
        kind = fault.kind
        if kind in _MODES:
            self._receiver.mode = _MODES[kind]
            return None, lambda: setattr(self._receiver, "mode", "good")
        if "connections" in kind:
            return self._connections(kind, target)
        if kind == "no worker":
            return self._no_worker(fault)
        if kind == "a job kills its worker":
            self._begin_extra(Load.killer, fault)
            return None, None
        if kind == "a background thread raises":
            return self._thread_raises(fault, target)
        if target in self._stack.slots:
            return self._process(fault, self._stack.slots[target])
        if target == "PostgreSQL":
            return self._postgres(kind)
        return self._redis(fault)

    def _process(self, fault: Fault, slot: Slot) -> tuple[int | None, Callable[[], None] | None]:
        stack = self._stack
        if fault.kind.startswith("kill -9"):
            return stack.kill(slot, back_after=fault.seconds), None
        if fault.kind.startswith("SIGSTOP"):
            process = slot.process
            assert process is not None
            slot.held = True
            process.send_signal(signal.SIGSTOP)  # nothing when it is gone

            def go_on() -> None:
                process.send_signal(signal.SIGCONT)
                slot.held = False

            return None, go_on
        if fault.kind.startswith("SIGTERM"):
            self._terminate(slot, fault.seconds)
            return None, None
        slot.extra["CHAOS_SKEW_SECONDS"] = str(SKEWS_SECONDS[fault.which % len(SKEWS_SECONDS)])
        self._terminate(slot, 0.1)

        def right_again() -> None:
            del slot.extra["CHAOS_SKEW_SECONDS"]
            self._terminate(slot, 0.1)

        return None, right_again

    def _begin_extra(self, scenario: Scenario, fault: Fault) -> None:
        self._load.begin_extra(scenario, fault.which, self._stack.background.loop)

    def _no_worker(self, fault: Fault) -> tuple[None, Callable[[], None]]:
        """Kill every worker and keep it away, while deadlines pass."""
        slots = self._slots("worker")
        for slot in slots:
            self._stack.kill(slot, back_after=0.0)
            slot.held = True
        for _ in range(OVERDUE_JOBS):
            self._begin_extra(Load.overdue, fault)

        def back() -> None:
            for slot in slots:
                slot.held = False

        return None, back

    def _thread_raises(self, fault: Fault, target: str) -> tuple[None, Callable[[], None]]:
        """Make the background threads of one process raise at each use of the database."""
        names = THREADS[target.partition("-")[0]]
        trigger = self._stack.trigger(target)
        trigger.write_text(names[fault.which // 7 % len(names)])
        return None, lambda: trigger.unlink(missing_ok=True)

    def _terminate(self, slot: Slot, back_after: float) -> None:
        """SIGTERM: it drains and ends by itself; `tend` begins it anew."""
        if slot.alive:
            assert slot.process is not None
            slot.expected = True
            slot.process.terminate()
            slot.due_at = time.monotonic() + back_after

    def _connections(self, kind: str, target: str) -> tuple[None, Callable[[], None] | None]:
        name, _, server = target.partition(" to ")
        proxy = self._stack.proxies[name][0 if server == "PostgreSQL" else 1]
        run = self._stack.background.run
        if kind == "connections cut":
            run(proxy.cut())
            return None, None
        run(proxy.pause())
        return None, lambda: run(proxy.resume())

    def _server(
        self, kind: str, server: EmbeddedPostgres | EmbeddedRedis
    ) -> tuple[int | None, Callable[[], None] | None]:
        process = server.process
        assert process is not None
        if kind.startswith("SIGSTOP"):
            self._stack.freeze(process.pid, stop=True)
            return None, lambda: self._stack.freeze(process.pid, stop=False)
        process.kill()
        process.wait(10)
        return process.pid, lambda: self._stack.restart_server(server)

    def _postgres(self, kind: str) -> tuple[int | None, Callable[[], None] | None]:
        if kind == "PostgreSQL is read-only":
            self._as_owner(_READ_ONLY, _END_CONNECTIONS)
            return None, lambda: self._as_owner(_WRITABLE)
        if kind != "kill -9 a backend of PostgreSQL":
            return self._server(kind, self._stack.postgres)
        # The server then ends all others and recovers, as after a crash. Clients come and go: a
        # backend may be gone by now.
        server = self._stack.postgres.process
        assert server is not None
        children = psutil.Process(server.pid).children()
        for backend in random.sample(children, len(children)):
            with suppress(psutil.NoSuchProcess):
                if any("127.0.0.1" in part for part in backend.cmdline()):
                    backend.kill()
                    break
        return None, None

    def _as_owner(self, *statements: str) -> None:
        """Run statements over a connection that may write whatever the role's default is."""
        deadline = time.monotonic() + 30
        while True:
            try:
                with psycopg.connect(
                    self._stack.database_url,
                    autocommit=True,
                    connect_timeout=5,
                    options="-c default_transaction_read_only=off",
                ) as connection:
                    for statement in statements:
                        connection.execute(statement)
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _redis(self, fault: Fault) -> tuple[int | None, Callable[[], None] | None]:
        kind = fault.kind
        if kind.endswith("Redis"):
            return self._server(kind, self._stack.redis)
        client = redis.Redis.from_url(self._stack.redis_url, socket_timeout=5)
        try:
            if kind == "FLUSHALL":
                client.flushall()
            elif kind in REDIS_REFUSALS:
                for _ in range(LONG_JOBS):
                    self._begin_extra(Load.endless, fault)
                time.sleep(BUSY_SECONDS)
                client.execute_command(*REDIS_REFUSALS[kind][0])
                return None, lambda: self._redis_command(*REDIS_REFUSALS[kind][1])
            else:
                self._messages(client, kind, random.Random(fault.which))
        finally:
            client.close()
        return None, None

    def _redis_command(self, *words: str) -> None:
        client = redis.Redis.from_url(self._stack.redis_url, socket_timeout=5)
        try:
            client.execute_command(*words)
        except RedisError:
            pass  # it was begun anew meanwhile, and then it has no bound
        finally:
            client.close()

    def _messages(self, client: redis.Redis, kind: str, rng: random.Random) -> None:
        known = [accepted.job_id for accepted in self._history.accepted[-400:]]
        if kind == "messages of nothing":
            queue = queue_name(MODEL, "normal")
            strange = [
                {"v": 999, "job_id": "job_x"},
                {"v": 1, "job_id": "job_00000000000000000000000000"},
            ]
            for content in strange * (MESSAGES // 2):
                client.lpush(queue, task_message(GENERATE_TASK, content, "chaos", queue))
            return
        if kind == "messages of jobs that are over":
            over = {seen.job_id for seen in self._history.seen[-2000:] if seen.end}
            known = [job_id for job_id in known if job_id in over]
        else:
            for queue in (
                queue_name(MODEL, priority) for priority in ("interactive", "normal", "bulk")
            ):
                replayed = client.lrange(queue, 0, MESSAGES)
                if replayed:
                    client.lpush(queue, *replayed)
        rng.shuffle(known)
        push_sync(
            client,
            [
                (job_id, MODEL, rng.choice(("interactive", "normal", "bulk")))
                for job_id in known[:MESSAGES]
            ],
        )
