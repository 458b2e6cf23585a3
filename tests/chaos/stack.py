"""The processes: PostgreSQL, Redis, APIs, workers, the sender of webhooks. Each ended by its id,
also on failure.

Whoever dies is begun anew after a while, as a supervisor would. All of it is driven by one thread:
the kernel ends a child when the *thread* that began it is gone.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
import psutil
import psycopg

from migrations.run import upgrade
from shared.errors import ConfigurationError
from tests.chaos import audit
from tests.chaos.bugs import BUGS
from tests.chaos.proxy import Proxy
from tests.chaos.records import Death
from vdiff.embedded import EmbeddedPostgres, EmbeddedRedis
from vdiff.embedded.process import die_with_parent, free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL_FOLDER = (
    ROOT / "tests" / "golden" / "llada"
)  # 64 wide, 4 layers: the jobs cost little, the job system is what is tried
MODEL = "chaos-tiny"
READY_SECONDS = 120
RESTART_SECONDS = 0.5  # after an end of its own accord
SETTINGS: dict[str, object] = {
    "model": MODEL_FOLDER,
    "served_model_name": MODEL,
    "max_num_seqs": 8,
    "num_threads": 1,
    "device": "cpu",
    "lease_seconds": 4.5,
    "heartbeat_seconds": 1.5,
    "sweep_seconds": 0.5,
    "repush_after_seconds": 2,
    "drain_seconds": 1,
    "max_attempts": 4,
    "auth": "required",
    "worker_stale_seconds": 10,
    "webhook_allow_private": True,
    "webhook_timeout_seconds": 2,
    "webhook_retry_seconds": ",".join(["0.5", "1", *["2"] * 300]),
    "webhook_per_receiver": 8,
    "log_format": "json",
    "log_level": "INFO",
}
DELIVERY_MARGIN_SECONDS = 3.0
T = TypeVar("T")


class Background:
    """An event loop in a thread, for clients, receiver and proxies; the main thread has the
    children for itself.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self.loop.run_forever, name="chaos-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@dataclass(slots=True)
class Slot:
    """A place for one process."""

    name: str
    arguments: tuple[str, ...]
    settings: dict[str, object]
    extra: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    process: subprocess.Popen[bytes] | None = None
    due_at: float = 0.0  # monotonic; when a dead one may begin anew
    held: bool = False  # by a fault: nobody begins it anew
    expected: bool = False  # its death was ours
    starts: int = 0
    started_at: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Stack:
    def __init__(
        self,
        *,
        apis: int = 2,
        workers: int = 2,
        bug: str | None = None,
        settings: Mapping[str, object] = {},
        logs: Path | None = None,
    ) -> None:
        # Other users must reach it: under root PostgreSQL is one.
        self.folder = Path(tempfile.mkdtemp(prefix="vdiff-chaos-")).resolve()
        self.folder.chmod(0o755)
        self.postgres = EmbeddedPostgres(self.folder / "postgres")
        self.redis = EmbeddedRedis(self.folder / "redis")
        self.database_url = self.redis_url = ""
        self.background = Background()
        self.proxies: dict[str, tuple[Proxy, Proxy]] = {}  # by slot: to PostgreSQL, to Redis
        self.slots: dict[str, Slot] = {}
        self.unplanned: list[str] = []  # deaths that were nobody's fault
        self.deaths: list[Death] = []  # the same, for the checker
        self._bug = None if bug is None else BUGS[bug]
        self._bug_name = bug
        self._settings = {**SETTINGS, **settings}
        self._apis, self._workers = apis, workers
        self._logs = logs

    # Begin and end

    def __enter__(self) -> Stack:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self.database_url, self.redis_url = self.postgres.start(), self.redis.start()
        upgrade(self.database_url)
        audit.install(self.database_url, *(self._bug.statements if self._bug else ()))
        for i in range(self._apis):
            # The second of each reaches its servers through proxies.
            self._add(f"api-{i}", ("api",), proxied=i == 1, port=free_port())
        for i in range(self._workers):
            self._add(f"worker-{i}", ("worker",), proxied=i == 1, extra={"CHAOS_KILLER": "1"})
        self._add(
            "deliver", ("deliver",), extra={"CHAOS_DELIVERY_MARGIN": str(DELIVERY_MARGIN_SECONDS)}
        )
        for slot in self.slots.values():
            self.begin(slot)
        self.wait_ready()

    def _add(
        self,
        name: str,
        arguments: tuple[str, ...],
        *,
        proxied: bool = False,
        port: int | None = None,
        extra: Mapping[str, str] = {},
    ) -> None:
        database, redis = self.database_url, self.redis_url
        if proxied:
            pair = (Proxy(self.postgres.port), Proxy(self.redis.port))
            for proxy in pair:
                self.background.run(proxy.start())
            self.proxies[name] = pair
            database, redis = _with_port(database, pair[0].port), _with_port(redis, pair[1].port)
        settings = {**self._settings, "database_url": database, "redis_url": redis}
        if port is not None:
            settings["port"] = port
        extra = {**extra, "CHAOS_TRIGGER": str(self.trigger(name))}
        self.slots[name] = Slot(name, arguments, settings, extra, port)

    def close(self) -> None:
        for slot in self.slots.values():
            self.end(slot)
        with suppress(RuntimeError, TimeoutError):
            for pair in self.proxies.values():
                for proxy in pair:
                    self.background.run(proxy.close())
        for server in (self.redis, self.postgres):
            if server.process is not None and server.process.poll() is None:
                self.freeze(server.process.pid, stop=False)
            server.stop()
        self.background.close()
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
            for log in self.folder.rglob("*.log"):
                shutil.copy(log, self._logs)
        shutil.rmtree(self.folder, ignore_errors=True)

    # One process

    def begin(self, slot: Slot) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("VDIFF_", "CHAOS_"))}
        env.update({f"VDIFF_{name.upper()}": str(value) for name, value in slot.settings.items()})
        env.update(slot.extra)
        env["PYTHONPATH"] = str(ROOT)
        if self._bug_name is not None:
            env["CHAOS_BUG"] = self._bug_name
        with self.log(slot).open("ab") as output:
            slot.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.launch", *slot.arguments],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )
        slot.starts += 1
        slot.started_at = time.time()
        slot.expected = False

    def trigger(self, name: str) -> Path:
        """Return the file that tells a process which of its threads raise; it need not exist."""
        return self.folder / f"{name}.trigger"

    def log(self, slot: Slot) -> Path:
        return self.folder / f"{slot.name}.log"

    def end(self, slot: Slot) -> None:
        if slot.process is not None and slot.process.poll() is None:
            slot.process.send_signal(signal.SIGKILL)  # works on a stopped one too
            slot.process.wait(10)

    def kill(self, slot: Slot, *, back_after: float) -> int | None:
        """kill -9; its pid. `tend` begins it anew."""
        if not slot.alive:
            return None
        assert slot.process is not None
        slot.expected = True
        slot.process.kill()
        slot.process.wait(10)
        slot.due_at = time.monotonic() + back_after
        return slot.process.pid

    def tend(self) -> None:
        """Begin anew whoever is gone and due."""
        for slot in self.slots.values():
            if slot.alive or slot.held:
                continue
            if slot.process is not None and slot.due_at <= 0:
                if not slot.expected:
                    now = time.time()
                    self.deaths.append(
                        Death(slot.name, slot.process.returncode, now, now - slot.started_at)
                    )
                    said = self.log(slot).read_text(errors="replace").strip().splitlines()
                    self.unplanned.append(
                        f"{slot.name} ended with {slot.process.returncode}: {said[-1][:300] if said else ''}"
                    )
                slot.due_at = time.monotonic() + RESTART_SECONDS
            if time.monotonic() >= slot.due_at:
                self.begin(slot)
                slot.due_at = 0.0

    def freeze(self, pid: int, *, stop: bool) -> None:
        """SIGSTOP, or SIGCONT, to a server and to everything below it: PostgreSQL's backends are
        processes of their own.
        """
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(pid)
            for process in [server, *server.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)

    # Servers

    def restart_server(self, server: EmbeddedPostgres | EmbeddedRedis) -> None:
        """Begin PostgreSQL or Redis anew on its data; a PostgreSQL whose backends still go refuses
        for a moment.
        """
        deadline = time.monotonic() + 60
        while True:
            try:
                server.start()
                return
            except ConfigurationError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    # Looking

    def api_urls(self) -> list[str]:
        return [
            f"http://127.0.0.1:{slot.port}" for slot in self.slots.values() if slot.port is not None
        ]

    def workers_ready(self) -> int:
        with psycopg.connect(self.database_url, connect_timeout=5) as connection:
            pids = [
                slot.process.pid
                for slot in self.slots.values()
                if slot.name.startswith("worker") and slot.process
            ]
            row = connection.execute(
                "SELECT count(*) FROM workers WHERE state = 'ready' AND pid = ANY (%s)", [pids]
            ).fetchone()
        assert row is not None
        return int(row[0])

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not (self._apis_ready() and self.workers_ready() == self._workers):
            self.tend()
            if time.monotonic() > deadline or len(self.unplanned) > 20:
                raise RuntimeError(
                    f"the processes are not ready after {READY_SECONDS} s: {self.unplanned[-3:]}"
                )
            time.sleep(0.1)

    def _apis_ready(self) -> bool:
        for url in self.api_urls():
            try:
                if httpx.get(f"{url}/health/live", timeout=2, trust_env=False).status_code != 200:
                    return False
            except httpx.HTTPError:
                return False
        return True


def _with_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}"))
