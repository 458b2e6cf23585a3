"""Runs the code of a `code` grader in a process of its own that shut itself in (`sandbox_child`),
and ends it on time.

The parent's part: a slot of the host's pool (`sandbox_pool`), a new process group with an empty
environment in an empty folder, a bounded answer, SIGKILL for the whole group when the time is over.
Off unless VDIFF_CODE_GRADERS is set.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.evaluations.graders import Grader, Verdict, failed
from shared.evaluations.sandbox_pool import SandboxPool

CHILD = Path(__file__).with_name("sandbox_child.py")
ANSWER_BYTES_MAX = 64 * 1024
START_SECONDS = 5.0  # for the interpreter, on top of the grader's own time


CHECK_SECONDS, CHECK_MEMORY_MB = 5.0, 256  # for compiling sources, which runs none of them


@dataclass(frozen=True, slots=True)
class BadSource:
    """Why a source cannot be a grader; `index` counts from 0."""

    index: int
    message: str


async def check(sources: Sequence[str], pool: SandboxPool, tenant: str) -> BadSource | None:
    """Compile the sources in one sandbox, without running them. Return the first that is wrong, or
    None.

    Raises:
        SandboxesBusy
    """
    async with pool.slot(tenant, is_request=True):
        answer = await _run(
            {"sources": list(sources)}, seconds=CHECK_SECONDS, memory_mb=CHECK_MEMORY_MB
        )
    if answer.get("ok"):
        return None
    return BadSource(
        int(answer.get("grader", 0)), str(answer.get("unavailable") or answer["error"])
    )


async def grade(
    grader: Grader, output: str, row: Mapping[str, Any], pool: SandboxPool, tenant: str
) -> Verdict:
    """Return the verdict of `grade(output, reference, item)`. The grader's time begins when a slot
    of the pool is free.
    """
    reference = None if grader.reference is None else grader.reference.value(row)
    task = {
        "source": grader.options["source"],
        "output": output,
        "reference": reference,
        "item": dict(row),
    }
    memory_mb = min(grader.options["memory_mb"], pool.memory_mb)
    async with pool.slot(tenant):
        answer = await _run(task, seconds=grader.options["timeout_seconds"], memory_mb=memory_mb)
    if "score" in answer:
        score = float(answer["score"])
        return Verdict(score >= grader.options["pass_at"], score=score)
    if "unavailable" in answer:
        return failed("sandbox_unavailable", answer["unavailable"])
    return failed(answer.get("code", "grader_failed"), answer["error"])


async def _run(task: Mapping[str, Any], *, seconds: float, memory_mb: int) -> dict[str, Any]:
    limits = (str(memory_mb), str(seconds))
    with tempfile.TemporaryDirectory(prefix="vdiff-grader-") as folder:
        os.chmod(folder, 0o755)  # under root it is another user that runs there
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-B",
            str(CHILD),
            *limits,
            cwd=folder,
            env={},
            start_new_session=True,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(seconds + START_SECONDS):
                raw = await _talk(process, json.dumps(task).encode())
                code = await process.wait()
        except TimeoutError:
            return {"error": f"not done after {seconds:g} s", "code": "grader_timeout"}
        finally:
            _kill(process)
            assert process.stdout is not None
            while await process.stdout.read(
                ANSWER_BYTES_MAX
            ):  # `wait` waits for the end of the pipe too
                pass
            await process.wait()
    if -code in (signal.SIGALRM, signal.SIGXCPU):
        return {"error": f"not done after {seconds:g} s", "code": "grader_timeout"}
    try:
        answer = json.loads(raw)
    except ValueError:
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"error": f"it ended without an answer ({ended})"}
    return answer if _is_answer(answer) else {"error": "it wrote something else than an answer"}


def _is_answer(answer: Any) -> bool:
    """One of those that the child writes; foreign code can write to that descriptor too."""
    match answer:
        case {"ok": True, **rest}:
            return not rest
        case {"score": float() | int() as score, **rest}:
            return not rest and 0 <= score <= 1  # not NaN either
        case {"error": str(), "grader": int(), **rest}:
            return not rest
        case {"error": str()} | {"unavailable": str()}:
            return len(answer) == 1
    return False


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _talk(process: asyncio.subprocess.Process, task: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(task)
        await process.stdin.drain()
        process.stdin.close()
    answer = b""
    while data := await process.stdout.read(ANSWER_BYTES_MAX):
        answer += data
        if len(answer) > ANSWER_BYTES_MAX:
            _kill(process)
            return b""
    return answer
