"""Fixtures of the job tests: a migrated database of one's own, jobs in it, and real worker
processes.

`postgres_url` and `redis_url` (servers for the whole run) come from `tests/conftest.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
import redis
from sqlalchemy import Row, insert, text
from sqlalchemy.engine import make_url

from migrations.run import upgrade
from shared import serving
from shared.algorithms import CACHES, FULL, algorithms_of
from shared.db.session import Database, sync_engine_unpooled
from shared.ids import new_id
from shared.jobs import repository
from shared.jobs.repository import JOBS
from shared.jobs.responses import ENDPOINTS
from shared.jobs.status import TERMINAL, JobStatus
from shared.keys import repository as keys
from shared.keys import tokens
from shared.keys.principal import DEFAULT_SCOPES
from shared.model_card import ModelCard
from shared.queue.messages import push_sync
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper
from shared.webhooks.secrets import new_secret
from vdiff import bundled
from vdiff.embedded.process import free_port

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "tests" / "golden" / "llada"
RUN_WORKER = (
    "import sys; from shared.settings import load_settings; from worker.main import run; "
    "sys.exit(run(load_settings()))"
)
REDIS_DB = 7  # apart from what other tests use, so that one may be flushed


PATIENCE = (
    4.0  # a machine that is shared takes several times as long; only a test that fails waits for it
)


def eventually(check: Callable[[], Any], *, seconds: float = 20.0, what: str = "") -> Any:
    """Return the first true value of `check`, called every 20 ms for up to `PATIENCE` times
    `seconds`.
    """
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or check}")
        time.sleep(0.02)


def create_database(postgres_url: str, name: str, template: str | None = None) -> str:
    """A new database on the server; its URL."""
    engine = sync_engine_unpooled(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
        )
    return make_url(postgres_url).set(database=name).render_as_string(hide_password=False)


def drop_database(postgres_url: str, name: str) -> None:
    engine = sync_engine_unpooled(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> Iterator[str]:
    name = f"vdiff_template_{uuid.uuid4().hex[:8]}"
    upgrade(create_database(postgres_url, name))
    yield name
    drop_database(postgres_url, name)


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    name = f"vdiff_empty_{uuid.uuid4().hex[:8]}"
    yield create_database(postgres_url, name)
    drop_database(postgres_url, name)


class WorkerProcess:
    """One `vdiff worker` in a process of its own, with short clocks."""

    def __init__(
        self,
        jobs: Jobs,
        log: Path,
        *,
        program: tuple[str, ...] = ("-c", RUN_WORKER),
        **settings: object,
    ) -> None:
        values = {
            "database_url": jobs.database_url,
            "redis_url": jobs.redis_url,
            "model": TINY_MODEL,
            "served_model_name": jobs.model,
            "max_num_seqs": 4,
            "num_threads": 1,
            "device": "cpu",
            "lease_seconds": 3,
            "heartbeat_seconds": 1,
            "sweep_seconds": 0.75,
            "repush_after_seconds": 2,
            "drain_seconds": 1,
            "log_format": "json",
            "log_level": "DEBUG",
            **settings,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
        env.update({f"VDIFF_{name.upper()}": str(value) for name, value in values.items()})
        self.log = log
        self._jobs = jobs
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program], cwd=ROOT, env=env, stdout=output, stderr=output
            )

    def wait_ready(self) -> WorkerProcess:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the worker ended with {self.process.returncode}:\n{self.tail()}"
                )
            return self.row() is not None

        eventually(is_ready, seconds=60, what="worker ready")
        return self

    def row(self) -> Row[Any] | None:
        with self._jobs.database.read() as session:
            return session.execute(
                text("SELECT * FROM workers WHERE pid = :pid"), {"pid": self.process.pid}
            ).one_or_none()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        return self.process.wait(seconds * PATIENCE)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(10)


class Jobs:
    """Submits jobs as the API does, and looks at their rows."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self.database_url = database_url
        self.redis_url = redis_url
        self.model = f"tiny-{uuid.uuid4().hex[:8]}"  # its own queues
        self.database = Database(database_url)
        self.redis = redis.Redis.from_url(redis_url)

    def submit(
        self,
        *,
        push: int = 1,
        slow: bool = False,
        max_attempts: int = 3,
        prompt: Sequence[int] = (5, 6, 7),
        **params: Any,
    ) -> str:
        """Insert a queued job and push its message `push` times; a slow one runs for many seconds."""
        job_id = new_id("job")
        sampling = SamplingParams(
            **{"max_tokens": 1000 if slow else 8, "temperature": 0.0, "seed": 1, **params}
        )
        with self.database.write() as session:
            session.execute(
                insert(JOBS).values(
                    id=job_id,
                    endpoint="/v1/completions",
                    model=self.model,
                    body={"model": self.model, "prompt": "x"},
                    params=sampling.to_json(),
                    prompt_token_ids=list(prompt),
                    max_attempts=max_attempts,
                )
            )
        if push:
            push_sync(self.redis, [(job_id, self.model, "normal")] * push)
            with self.database.write() as session:
                session.execute(repository.mark_pushed([job_id]))
        return job_id

    def row(self, job_id: str) -> Row[Any]:
        with self.database.read() as session:
            return session.execute(repository.get_job(job_id)).one()

    def outcomes(self, job_id: str) -> list[str]:
        """The outcomes of its attempts, oldest first."""
        with self.database.read() as session:
            return [row.outcome for row in session.execute(repository.job_attempts(job_id))]

    def wait_status(self, job_id: str, status: JobStatus, *, seconds: float = 20.0) -> Row[Any]:
        return eventually(
            lambda: (row := self.row(job_id)).status == status and row, seconds=seconds, what=status
        )

    def wait_done(self, job_id: str, *, seconds: float = 30.0) -> Row[Any]:
        return eventually(
            lambda: (row := self.row(job_id)).status in TERMINAL and row,
            seconds=seconds,
            what=f"{job_id} done",
        )

    def wait_progress(self, job_id: str, *, seconds: float = 20.0) -> Row[Any]:
        """The row once its worker has beaten for it with some tokens."""
        return eventually(
            lambda: (row := self.row(job_id)).progress and row.status == JobStatus.RUNNING and row,
            seconds=seconds,
            what="progress",
        )

    def execute(self, statement: Any) -> list[Row[Any]]:
        with self.database.write() as session:
            return list(session.execute(statement).all())

    def close(self) -> None:
        self.database.dispose()
        self.redis.close()


def jobs_with_database(postgres_url: str, redis_url: str, template: str, stack: ExitStack) -> Jobs:
    name = f"vdiff_jobs_{uuid.uuid4().hex[:8]}"
    stack.callback(drop_database, postgres_url, name)
    parts = urlsplit(redis_url)
    jobs = Jobs(
        create_database(postgres_url, name, template),
        urlunsplit(parts._replace(path=f"/{REDIS_DB}")),
    )
    stack.callback(jobs.close)
    return jobs


@pytest.fixture
def jobs(postgres_url: str, redis_url: str, migrated_template: str) -> Iterator[Jobs]:
    with ExitStack() as stack:
        yield jobs_with_database(postgres_url, redis_url, migrated_template, stack)


@pytest.fixture(scope="module")
def jobs_module(postgres_url: str, redis_url: str, migrated_template: str) -> Iterator[Jobs]:
    """One database for all tests of a module, for tests that mind only their own jobs."""
    with ExitStack() as stack:
        yield jobs_with_database(postgres_url, redis_url, migrated_template, stack)


@pytest.fixture
def start_worker(jobs: Jobs, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker for this test; keywords are settings. All are gone afterwards."""
    started: list[WorkerProcess] = []

    def start(**settings: Any) -> WorkerProcess:
        worker = WorkerProcess(jobs, tmp_path / f"worker-{len(started)}.log", **settings)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.end()


@pytest.fixture(scope="module")
def served_jobs(
    postgres_url: str,
    redis_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Jobs]:
    """Jobs with one worker that serves all tests of a module."""
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        worker = WorkerProcess(jobs, tmp_path_factory.mktemp("worker") / "worker.log")
        stack.callback(worker.end)
        worker.wait_ready()
        yield jobs


class ApiProcess:
    """One `vdiff api` in a process of its own."""

    def __init__(self, jobs: Jobs, log: Path, **settings: object) -> None:
        self.jobs = jobs
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        values = {
            "database_url": jobs.database_url,
            "redis_url": jobs.redis_url,
            "port": self.port,
            "log_format": "json",
            **settings,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
        env.update({f"VDIFF_{name.upper()}": str(value) for name, value in values.items()})
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vdiff", "api"],
                cwd=ROOT,
                env=env,
                stdout=output,
                stderr=output,
            )

    def wait_ready(self, *, path: str = "/health/ready") -> ApiProcess:
        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the API ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            with suppress(httpx.HTTPError):
                return httpx.get(self.url + path, timeout=120).status_code == 200
            return False

        eventually(is_ready, seconds=60, what="API ready")
        return self

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@dataclass(frozen=True)
class Served:
    """A whole vdiff: API and worker with the bundled model, on a database of their own."""

    url: str
    model: str
    jobs: Jobs
    api: ApiProcess
    worker: WorkerProcess
    client: httpx.Client


@pytest.fixture(scope="session")
def served(
    postgres_url: str,
    redis_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        worker = WorkerProcess(
            jobs,
            folder / "worker.log",
            model=bundled.folder(bundled.DEFAULT_MODEL),
            served_model_name="vdiff-tiny",
            verifier=bundled.folder(bundled.DEFAULT_VERIFIER),
        )
        stack.callback(worker.end)
        jobs.model = "vdiff-tiny"
        api = ApiProcess(jobs, folder / "api.log", max_body_bytes=2_000_000, code_graders=True)
        stack.callback(api.end)
        worker.wait_ready()
        api.wait_ready()
        client = stack.enter_context(httpx.Client(base_url=api.url, timeout=60))
        yield Served(api.url, jobs.model, jobs, api, worker, client)


def register_tiny(jobs: Jobs) -> None:
    """Register the bundled model as its worker does, without loading it."""
    tokenizer = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
    mask, end = tokenizer.special_id("mask_token") or 0, tokenizer.special_id("eos_token") or 0
    card = ModelCard(
        name="vdiff-tiny",
        family="llada",
        context_length=512,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=mask,
        end_token_ids=(end,),
        suppress_token_ids={"logits": (end,), "confidence": (end,)},
        block_length=8,
        capabilities={
            "algorithms": list(algorithms_of(FULL, verifier=False)),
            "caches": list(CACHES[FULL]),
            "logprobs": True,
            "infill": True,
            "endpoints": list(ENDPOINTS),
        },
    )
    with jobs.database.write() as session:
        session.execute(serving.register_model(card, tokenizer.files()))


@pytest.fixture(scope="module")
def workerless(
    postgres_url: str,
    redis_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ApiProcess]:
    """An API on a database of its own that knows the bundled model and has no worker: accepted jobs
    stay queued.
    """
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        register_tiny(jobs)
        log = tmp_path_factory.mktemp("workerless") / "api.log"
        api = ApiProcess(
            jobs,
            log,
            sync_timeout_seconds=0.2,
            max_wait_seconds=0.2,
            webhook_allow_private="true",
            code_graders="true",
        )
        stack.callback(api.end)
        yield api.wait_ready()
        assert '"unhandled"' not in log.read_text()


def new_key(jobs: Jobs, *, tenant: str | None = None, **options: Any) -> str:
    """An API key, made as `vdiff keys create` does it, without another process."""
    key_id = tokens.new_key_id()
    key = tokens.new_key(key_id)
    values: dict[str, Any] = dict.fromkeys(
        ("requests_per_minute", "max_queued_jobs", "max_queued_tokens", "expires_at")
    )
    values.update(
        {"scopes": [s.value for s in DEFAULT_SCOPES], "weight": 1, "name": "test", **options}
    )
    with jobs.database.write() as session:
        session.execute(
            keys.create(
                key_id,
                tenant=tenant or new_id("tenant"),
                key_hash=tokens.hash_key(key),
                webhook_secret=new_secret(),
                **values,
            )
        )
    return key


def metric(served: Served, name: str, **labels: str) -> float:
    """The sum of all series of that name and those labels at /metrics; 0 when there is none."""
    return sum(
        float(line.rpartition(" ")[2])
        for line in served.client.get("/metrics").text.splitlines()
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items())
    )
