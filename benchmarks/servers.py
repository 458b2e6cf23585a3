"""A whole vdiff for a benchmark: PostgreSQL, Redis, one worker and the API on free ports, gone when
the block ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from migrations.run import upgrade
from vdiff.embedded import EmbeddedPostgres, EmbeddedRedis
from vdiff.embedded.process import die_with_parent, free_port, stop_process

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 150.0
STOP_SECONDS = 15.0


def clean_environment() -> dict[str, str]:
    """The environment without settings of vdiff, with this checkout first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


@contextmanager
def public_folder() -> Iterator[Path]:
    """A temporary folder that other users may enter: under root, PostgreSQL runs as one."""
    with tempfile.TemporaryDirectory(prefix="vdiff-bench-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _start(command: str, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "vdiff", command],
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )


@dataclass(frozen=True, slots=True)
class Whole:
    """The addresses of the parts."""

    url: str
    database_url: str
    redis_url: str


@contextmanager
def served(model: Path, *, name: str, slots: int) -> Iterator[str]:
    """The URL of an API whose only worker serves the model as `name` with so many slots. Raises as
    `whole` does.
    """
    with whole(model, name=name, slots=slots) as parts:
        yield parts.url


@contextmanager
def whole(
    model: Path,
    *,
    name: str,
    slots: int,
    settings: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
) -> Iterator[Whole]:
    """`served`, with its database.

    Args:
        settings: further variables of every part.
        more: commands to be run beside worker and API: `deliver` for one.

    Raises:
        RuntimeError: a part ended or was not ready in time; the last lines of its log are in the
            message.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(public_folder())
        postgres, redis = EmbeddedPostgres(folder / "postgres"), EmbeddedRedis(folder / "redis")
        stack.callback(postgres.stop)
        database_url = postgres.start()
        stack.callback(redis.stop)
        redis_url = redis.start()
        upgrade(database_url)
        port = free_port()
        env = {
            **clean_environment(),
            "VDIFF_DATABASE_URL": database_url,
            "VDIFF_REDIS_URL": redis_url,
            "VDIFF_PORT": str(port),
            "VDIFF_MODEL": str(model),
            "VDIFF_SERVED_MODEL_NAME": name,
            "VDIFF_MAX_NUM_SEQS": str(slots),
            "VDIFF_DEVICE": "cpu",
            "VDIFF_DRAIN_SECONDS": "0",
            **(settings or {}),
        }
        parts = {
            part: _start(part, env, folder / f"{part}.log") for part in ("worker", "api", *more)
        }
        for process in parts.values():
            stack.callback(stop_process, process, signal.SIGTERM, STOP_SECONDS)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while not _ready(url):
            for part, process in parts.items():
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (folder / f"{part}.log").read_text(errors="replace")
                    raise RuntimeError(f"the {part} is not ready:\n{log[-2000:]}")
            time.sleep(0.1)
        yield Whole(url, database_url, redis_url)


def _ready(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    return False
