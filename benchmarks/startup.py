"""`make up` of a fresh clone to the first answer: cold (no .venv, no data) and warm (both there).

Only what is committed is cloned. pip's own cache is left as it is: what it already has is not
downloaded again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from report import say
from servers import clean_environment, public_folder

from vdiff.embedded.process import free_port

JOB = {
    "endpoint": "/v1/chat/completions",
    "body": {"model": "vdiff-tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}]},
}
STOP_SECONDS = 30.0
TELL_SECONDS = 20.0


def first_answer(clone: Path, what: str, limit_seconds: float) -> dict[str, Any]:
    """Seconds from `make up` to ready and to the first answer, and from SIGINT to the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        k: v
        for k, v in clean_environment().items()
        if k not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")
    }
    log = clone.parent / f"{what}.log"
    began = told = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "up", f"ARGS=--port {port}"],
            cwd=clone,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        ready = None
        while ready is None:
            now = time.monotonic()
            if process.poll() is not None or now - began > limit_seconds:
                raise RuntimeError(
                    f"make up is not ready:\n{log.read_text(errors='replace')[-2000:]}"
                )
            if now - told > TELL_SECONDS:
                told = now
                say(f"startup, {what}: {now - began:.0f} s so far, at most {limit_seconds:.0f} s")
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                    ready = time.monotonic()
            time.sleep(0.05)
        answer = httpx.post(f"{url}/v1/jobs", json=JOB, headers={"Prefer": "wait=30"}, timeout=60)
        answered = time.monotonic()
        text = answer.json()["result"]["choices"][0]["message"]["content"]
    finally:
        stopping = time.monotonic()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: make and vdiff up
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {
        "start": what,
        "until_ready_s": ready - began,
        "until_first_answer_s": answered - began,
        "stop_s": time.monotonic() - stopping,
        "answer": text,
    }


def run(*, source: str, limit_seconds: float) -> list[dict[str, Any]]:
    """Cold, then warm, in one clone."""
    with public_folder() as folder:
        clone = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", source, str(clone)], check=True)
        return [first_answer(clone, what, limit_seconds) for what in ("cold", "warm")]
