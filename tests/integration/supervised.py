"""`vdiff up` as a person runs it: a process, its lines, and everything below it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.integration.conftest import PATIENCE, ROOT, eventually
from vdiff.embedded.process import free_port

READY_SECONDS = 150
STOP_SECONDS = 20
SHORT_CLOCKS = {
    "LEASE_SECONDS": 3,
    "HEARTBEAT_SECONDS": 1,
    "SWEEP_SECONDS": 0.75,
    "REPUSH_AFTER_SECONDS": 2,
    "NUM_THREADS": 1,
}


def chat_job(content: str = "What is 17 + 25?", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {
        "endpoint": "/v1/chat/completions",
        "body": {"model": "vdiff-tiny", "messages": messages, **body},
    }


def long_job(n: int = 1) -> dict[str, Any]:
    """Runs for seconds: many steps, one token each, no early end."""
    return chat_job(max_tokens=256, ignore_eos=True, diffusion={"block_length": 256}, n=n)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may enter: under root PostgreSQL is one.

    Not pytest's: those are private, and each new run of pytest closes the folder above them again.
    """
    folder = Path(tempfile.mkdtemp(prefix="vdiff-up-")).resolve()
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def alive(process: psutil.Process) -> bool:
    """Not ended and no zombie; it may end between the two looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Up:
    """One `vdiff up`; `end` leaves nothing behind, whatever happened."""

    def __init__(
        self,
        folder: Path,
        *options: object,
        command: Sequence[object] = (sys.executable, "-m", "vdiff"),
        flower: bool = False,
        path: Path | None = ROOT,
        data_dir: Path | None = None,
        **settings: object,
    ) -> None:
        self.data_dir = data_dir or folder / "data"
        self.log = folder / f"up-{free_port()}.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("VDIFF_", "PYTHON"))}
        if path is not None:
            env["PYTHONPATH"] = str(path)
        env.update(
            {
                f"VDIFF_{name.upper()}": str(value)
                for name, value in {**SHORT_CLOCKS, **settings}.items()
            }
        )
        own = [
            "up",
            "--data-dir",
            self.data_dir,
            "--port",
            self.port,
            *([] if flower else ["--no-flower"]),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in (*command, *own, *options)],
                cwd=folder,
                env=env,
                stdout=log,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
            )
        self.seen: dict[int, psutil.Process] = {}

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def below(self) -> list[psutil.Process]:
        """Everything that runs below it now; remembered for `left`."""
        if self.process.poll() is not None:  # its number may be another's by now
            return self.left()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(child.pid, child)
        return self.left()

    def left(self) -> list[psutil.Process]:
        """Return the processes ever seen below it that still run; psutil recognises a pid that was
        reused.
        """
        return [child for child in self.seen.values() if alive(child)]

    def command_lines(self) -> list[str]:
        """Return the command lines of the processes below it, except those that end meanwhile
        (PostgreSQL's helpers come and go).
        """
        lines = []
        for child in self.below():
            with suppress(psutil.NoSuchProcess):
                lines.append(" ".join(child.cmdline()))
        return lines

    def wait_said(self, words: str, *, seconds: float = READY_SECONDS) -> Up:
        def has() -> bool:
            self.below()
            if words in self.said:
                return True
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode}:\n{self.said[-3000:]}\n{self.errors()}"
            )
            return False

        eventually(has, seconds=seconds, what=words)
        return self

    def wait_ready(self) -> Up:
        self.wait_said("Ctrl-C stops everything.")
        self.below()
        return self

    def errors(self) -> str:
        """Return what it wrote to stderr; call it when it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def part(self, name: str) -> psutil.Process:
        """The child that is the worker, the api, redis or postgres."""

        def found() -> psutil.Process | None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children():
                    with suppress(psutil.NoSuchProcess):
                        line = child.cmdline()
                        program = Path(line[0]).name if line else ""
                        if line[-1:] == [name] or program.startswith(name):
                            return child
            return None

        child: psutil.Process = eventually(found, seconds=60, what=name)
        return child

    def done(self, job: dict[str, Any], *, seconds: float = 90) -> dict[str, Any]:
        """Submit it, whatever is away just now, and wait for its end."""
        made: list[dict[str, Any]] = []

        def accepted() -> bool:
            with suppress(httpx.TransportError):
                answer = httpx.post(f"{self.url}/v1/jobs", json=job, timeout=120)
                if answer.status_code == 202:
                    made.append(answer.json())
            return bool(made)

        self._eventually(accepted, seconds=seconds, what="accepted")
        return self.wait(made[0]["id"], seconds=seconds)

    def wait(self, job_id: str, *, seconds: float = 90) -> dict[str, Any]:
        def over() -> Any:
            with suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}/v1/jobs/{job_id}", params={"wait": 1}, timeout=120)
                if answer.status_code == 200 and answer.json()["done"]:
                    return answer.json()
            return None

        job: dict[str, Any] = self._eventually(over, seconds=seconds, what=f"{job_id} done")
        return job

    def _eventually(self, check: Callable[[], Any], *, seconds: float, what: str) -> Any:
        try:
            return eventually(check, seconds=seconds, what=what)
        except AssertionError as exc:
            exc.add_note(f"exit code {self.process.poll()}; it said:\n{self.said[-4000:]}")
            raise

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code; an error when it takes longer than it may."""
        self.below()
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS * PATIENCE)

    def end(self) -> None:
        self.below()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for child in self.left():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(self.seen.values(), timeout=10)
        if self.process.stderr is not None:
            self.process.stderr.close()


def curl_line(said: str) -> str:
    found = re.search(r"^ +(curl .*)$", said, re.MULTILINE)
    assert found, said
    return found.group(1)
