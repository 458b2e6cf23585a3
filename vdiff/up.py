"""`vdiff up`: everything on one machine, supervised. PostgreSQL, Redis, migrations, workers, API,
Flower.

The supervisor is the parent of all. A child that dies is started again, after 1, 2, 4 ... 30
seconds; one that says its configuration is wrong (exit code 2) while things come up ends all of it.
On SIGTERM or Ctrl-C the children get SIGTERM at once (the API closes, workers drain), then Redis
and PostgreSQL stop. Should the supervisor itself be killed, the kernel passes it on to the children
(Linux).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import httpx
from pydantic import SecretStr
from rich.console import Console
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from migrations import run as migrations
from shared.db.session import Database
from shared.errors import ConfigurationError
from shared.settings import Settings, is_loopback
from shared.vault import vault_of
from shared.webhooks import stored_secrets
from vdiff import bundled, local
from vdiff.embedded import EmbeddedPostgres, EmbeddedRedis
from vdiff.embedded.process import die_with_parent, free_port, stop_process

EXIT_CONFIGURATION = 2
READY_SECONDS = 150.0
BACKOFF_SECONDS_MAX = 30.0
STEADY_SECONDS = 60.0  # a child that lived so long starts again at once when it dies
STOP_MARGIN_SECONDS = 5.0  # beyond drain_seconds, until a child is killed
POLL_SECONDS = 0.2


def port_is_free(host: str, port: int) -> bool:
    """Raises OSError: nobody can listen there, however free it is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            return False
    return True


@dataclass
class Child:
    """One supervised part: how to start it, and how often it has died."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    essential: bool = True  # Flower is not: without it everything works
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    deaths: int = 0
    retry_at: float | None = None
    last_lines: list[str] = field(default_factory=list)


class Supervisor:
    """Runs until it is told to stop; `run` gives the exit code.

    Raises:
        ConfigurationError: something is set wrongly, and nothing was left running.
    """

    def __init__(self, settings: Settings, *, workers: int = 1, flower: bool = True) -> None:
        self._settings = settings
        self._workers = workers
        self._flower = flower and (
            settings.flower_basic_auth is not None or is_loopback(settings.host)
        )
        self._flower_left_out = flower and not self._flower
        self._stop = threading.Event()
        self._signals = 0
        self._children: list[Child] = []
        self._embedded: list[Child] = []
        self._servers: list[EmbeddedPostgres | EmbeddedRedis] = []
        self._env: dict[str, str] = {}
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._data_dir = settings.data_dir.expanduser().absolute()
        self._port = settings.port
        self._flower_port = settings.flower_port
        self._lock: IO[str] | None = None

    # Life

    def run(self) -> int:
        """Start all, watch, stop all."""
        before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._check()
            self._start_servers()
            self._start_children()
            if self._wait_ready():
                self._announce()
                self._watch()
            return 0
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._stop.set()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _check(self) -> None:
        """Check what can be known to fail before anything starts."""
        s = self._settings
        if s.model is not None:
            path = Path(s.model).expanduser()
            looks_like_a_path = s.model.startswith((".", "/", "~")) or s.model.count("/") != 1
            if not path.is_dir() and looks_like_a_path:
                raise ConfigurationError(f"model {s.model!r}: no such folder", param="model")
            if path.is_dir() and not (path / "config.json").is_file():
                raise ConfigurationError(
                    f"model {s.model!r}: the folder has no config.json", param="model"
                )
        elif not (bundled.folder(bundled.DEFAULT_MODEL) / "config.json").is_file():
            raise ConfigurationError(
                "the bundled model is missing; give one with --model", param="model"
            )
        try:
            self._take_ports()
        except OSError as exc:
            message = f"cannot listen on {s.host}, port {self._port}: {exc.strerror}; choose others with --host and --port"
            raise ConfigurationError(message, param="host") from exc
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self._data_dir / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            message = f"another `vdiff up` uses {self._data_dir}; stop it, or choose another folder with --data-dir"
            raise ConfigurationError(message, param="data_dir") from exc
        except OSError as exc:
            raise ConfigurationError(f"{self._data_dir}: {exc.strerror}", param="data_dir") from exc

    def _take_ports(self) -> None:
        """Raises ConfigurationError: the API's is in use; OSError."""
        s = self._settings
        if self._port == 0:
            self._port = free_port(s.host)
        elif not port_is_free(s.host, self._port):
            message = f"port {self._port} on {s.host} is in use; choose another with --port"
            raise ConfigurationError(message, param="port")
        if self._flower and not port_is_free(s.host, self._flower_port):
            self._flower_port = free_port(s.host)
            self._say(f"port {s.flower_port} is in use; Flower takes {self._flower_port}")

    def _start_servers(self) -> None:
        s = self._settings
        database_url, redis_url = s.database_url, s.redis_url
        if database_url is None:
            self._say(f"starting PostgreSQL in {self._data_dir / 'postgres'}")
            database_url = self._embed("postgres", EmbeddedPostgres(self._data_dir / "postgres"))
        if redis_url is None:
            self._say(f"starting Redis in {self._data_dir / 'redis'}")
            redis_url = self._embed(
                "redis",
                EmbeddedRedis(self._data_dir / "redis", maxmemory_bytes=s.redis_maxmemory_bytes),
            )
        self._check_redis(redis_url)
        secret_keys = s.secret_keys
        if secret_keys is None and s.database_url is None:
            # Another PostgreSQL may serve other machines, which would not have this folder's key.
            secret_keys = local.ensure_secret_key(self._data_dir)
        self._say("migrating the database")
        try:
            migrations.upgrade(database_url)
        except OperationalError as exc:
            reason = str(exc.orig).strip().splitlines()[0]
            raise ConfigurationError(
                f"cannot migrate the database: {reason}", param="database_url"
            ) from exc
        except SQLAlchemyError as exc:
            raise ConfigurationError(
                f"cannot migrate the database: {exc}", param="database_url"
            ) from exc
        self._encrypt_secrets(database_url, secret_keys)
        self._env = {
            **os.environ,
            **s.environment(),
            "VDIFF_DATABASE_URL": database_url,
            "VDIFF_REDIS_URL": redis_url,
            "VDIFF_HOST": s.host,
            "VDIFF_PORT": str(self._port),
            "VDIFF_FLOWER_PORT": str(self._flower_port),
            "VDIFF_DATA_DIR": str(self._data_dir),
            "PYTHONUNBUFFERED": "1",
            **(
                {} if secret_keys is None else {"VDIFF_SECRET_KEYS": secret_keys.get_secret_value()}
            ),
        }
        local.publish(
            self._data_dir, database_url=database_url, redis_url=redis_url, api_url=self._url
        )
        if self._workers > 1 and s.num_threads is None:
            cores = (
                len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else os.cpu_count() or 1
            )
            self._env["VDIFF_NUM_THREADS"] = str(max(1, (cores - 1) // self._workers))

    @staticmethod
    def _encrypt_secrets(url: str, secret_keys: SecretStr | None) -> None:
        """Encrypt what a version without keys stored in clear. Raises ConfigurationError: a key is
        missing.
        """
        if secret_keys is None:
            return
        database = Database(url, pool_size=1)
        try:
            stored_secrets.reseal(database, vault_of(secret_keys))
        finally:
            database.dispose()

    @staticmethod
    def _check_redis(url: str) -> None:
        import redis

        client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5)
        try:
            client.ping()
        except (redis.RedisError, OSError) as exc:
            raise ConfigurationError(f"cannot reach Redis: {exc}", param="redis_url") from exc
        finally:
            client.close()

    def _embed(self, name: str, server: EmbeddedPostgres | EmbeddedRedis) -> str:
        self._servers.append(server)
        url = server.start()

        def again() -> subprocess.Popen[bytes]:
            server.start()  # on the same port, so the URL holds
            assert server.process is not None
            return server.process

        self._embedded.append(
            Child(name, again, process=server.process, started_at=time.monotonic())
        )
        return url

    def _start_children(self) -> None:
        names = (
            [f"worker-{i + 1}" for i in range(self._workers)] if self._workers > 1 else ["worker"]
        )
        commands = [(name, "worker") for name in names] + [("api", "api"), ("deliver", "deliver")]
        if self._flower:
            commands.append(("flower", "flower"))
        (self._data_dir / "logs").mkdir(exist_ok=True)
        for name, command in commands:
            child = Child(name, lambda: subprocess.Popen([]), essential=command != "flower")
            child.start = self._starter(child, command)
            self._children.append(child)
            self._say(f"starting {name}")
            self._launch(child)

    def _starter(self, child: Child, command: str) -> Callable[[], subprocess.Popen[bytes]]:
        def start() -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "vdiff", command],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
            threading.Thread(target=self._pass_on, args=(child, process), daemon=True).start()
            return process

        return start

    def _pass_on(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        """A child's lines to the terminal, with its name, and to its log file."""
        assert process.stdout is not None
        with (self._data_dir / "logs" / f"{child.name}.log").open("ab") as log:
            for raw in process.stdout:
                log.write(raw)
                log.flush()
                line = raw.decode(errors="replace").rstrip()
                child.last_lines = [*child.last_lines[-4:], line]
                if child.essential:
                    self._say(f"{child.name:<8} | {line}")

    # Watching

    def _launch(self, child: Child) -> None:
        child.process = child.start()
        child.started_at = time.monotonic()
        child.retry_at = None

    def _tend(self, child: Child, *, starting: bool) -> None:
        """Notice a death, start again when it is time."""
        now = time.monotonic()
        if child.retry_at is not None:
            if now >= child.retry_at:
                self._say(f"starting {child.name} again")
                try:
                    self._launch(child)
                except (ConfigurationError, OSError) as exc:
                    self._again_later(child, f"does not start: {exc}")
            return
        if child.process is None or child.process.poll() is None:
            return
        code = child.process.returncode
        if code == EXIT_CONFIGURATION and starting and child.essential:
            time.sleep(0.2)  # its last line may be on its way
            why = next(
                (line for line in reversed(child.last_lines) if line), f"{child.name} gave up"
            )
            raise ConfigurationError(why.removeprefix("vdiff: ").removeprefix("vdiff worker: "))
        if now - child.started_at > STEADY_SECONDS:
            child.deaths = 0
        self._again_later(
            child, f"ended with {code}" if code >= 0 else f"was ended by signal {-code}"
        )

    def _again_later(self, child: Child, why: str) -> None:
        wait = min(2.0**child.deaths, BACKOFF_SECONDS_MAX)
        child.deaths += 1
        child.retry_at = time.monotonic() + wait
        self._say(f"{child.name} {why}; it starts again in {wait:g} s")

    def _tend_all(self, *, starting: bool) -> None:
        for child in (*self._embedded, *self._children):
            self._tend(child, starting=starting)

    @property
    def _url(self) -> str:
        host = self._settings.host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    def _wait_ready(self) -> bool:
        """Until a worker and the API take jobs; False when told to stop before."""
        deadline = time.monotonic() + READY_SECONDS
        while not self._stop.is_set():
            self._tend_all(starting=True)
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{self._url}/health/ready", timeout=2)
                if answer.status_code == 200 and answer.json()["workers"] > 0:
                    return True
            if time.monotonic() > deadline:
                self._say(
                    f"not ready after {READY_SECONDS:.0f} s; a large model may take longer, see the lines above"
                )
                deadline = float("inf")
            self._stop.wait(POLL_SECONDS)
        return False

    def _announce(self) -> None:
        url, key = self._url, self._settings.api_key
        authorization = {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}
        answer = httpx.get(f"{url}/v1/models", timeout=5, headers=authorization)
        models = (
            answer.json()["data"] if answer.status_code == 200 else [{"id": "MODEL", "workers": 0}]
        )
        # Not simply the first: the data folder may remember models that nobody serves today.
        served = next((m["id"] for m in models if m["workers"]), models[0]["id"])
        shown = (
            "" if answer.status_code == 200 and key is None else " -H 'authorization: Bearer KEY'"
        )
        self._say("")
        self._say(f"vdiff is ready   dashboard {url}/   API {url}/v1   docs {url}/docs")
        if self._flower:
            self._say(f"Flower           {url.rpartition(':')[0]}:{self._flower_port}")
        elif self._flower_left_out:
            self._say(
                "Flower           left out: beyond loopback it needs VDIFF_FLOWER_BASIC_AUTH=name:password"
            )
        self._say(f"data and logs    {self._data_dir}")
        body = (
            f'{{"endpoint":"/v1/chat/completions","body":{{"model":"{served}",'
            '"messages":[{"role":"user","content":"What is 17 + 25?"}]}}'
        )
        self._say("try:")
        self._say(
            f"  curl -s {url}/v1/jobs -H 'content-type: application/json' -H 'prefer: wait=30'{shown} -d '{body}'"
        )
        if answer.status_code == 401:
            self._say(
                "  an API key is needed here, because the server listens beyond loopback: vdiff keys create NAME"
            )
        self._say("Ctrl-C stops everything.")

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._tend_all(starting=False)

    # Stopping

    def _stop_all(self) -> None:
        running = [c for c in self._children if c.process is not None and c.process.poll() is None]
        if running:
            self._say(
                f"stopping; running jobs get up to {self._settings.drain_seconds:g} s (again: stop at once)"
            )
        for child in running:
            self._send(child, signal.SIGTERM)
        deadline = time.monotonic() + self._settings.drain_seconds + STOP_MARGIN_SECONDS
        hurried = False
        while running and time.monotonic() < deadline:
            if self._signals > 1 and not hurried:
                hurried = True
                for child in running:
                    self._send(child, signal.SIGTERM)  # a worker's second: give back at once
            running = [c for c in running if c.process is not None and c.process.poll() is None]
            time.sleep(0.05)
        for child in running:
            self._say(f"{child.name} does not end; killing it")
            self._send(child, signal.SIGKILL)
        for server in reversed(self._servers):
            server.stop()
        for child in self._children:
            if child.process is not None:
                stop_process(child.process, signal.SIGKILL, 1)
        if self._env:  # else the file is that of another `vdiff up`
            local.withdraw(self._data_dir)
        if self._lock is not None:
            self._lock.close()
        if self._children:
            self._say("stopped")

    @staticmethod
    def _send(child: Child, number: int) -> None:
        if child.process is not None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)
