"""Foreign code in the real sandbox: it may think, and nothing else."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from shared.evaluations import sandbox
from shared.evaluations.grader_requests import parse_graders
from shared.evaluations.graders import Grader, Verdict

HEAD = "import ctypes, os, _thread\nlibc = ctypes.CDLL(None)\ndef grade(output, reference, item):\n    "
PARENT = os.getpid()


def grader(source: str, **options: Any) -> Grader:
    value = [{"type": "code", "source": source, "timeout_seconds": 1, **options}]
    return parse_graders(value, code_allowed=True)[0]


def grade(body: str, output: str = "42", **options: Any) -> Verdict:
    return asyncio.run(sandbox.grade(grader(HEAD + body, **options), output, {"reference": "42", "x": 3}))


def test_code_grades() -> None:
    assert grade("return output == reference and item['x'] == 3").passed is True
    assert grade("return output == reference", output="41").passed is False
    half = grade("return 0.5")
    assert (half.passed, half.score) == (False, 0.5)
    assert grade("return 0.5", pass_at=0.5).passed is True
    assert grade("exec('def f(x): return x + 1', globals()); return f(1) == 2").passed is True


HARM = [
    ("forks", "os.fork()", "PermissionError"),
    ("forks past Python", "return libc.fork() >= 0", None),
    ("starts a thread", "_thread.start_new_thread(print, ())", "can't start new thread"),
    ("starts a program", "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "PermissionError"),
    ("opens a socket", "return libc.socket(2, 1, 0) >= 0", None),
    ("kills", f"os.kill({PARENT}, 9)", "PermissionError"),
    ("reads secrets", f"return len(open('/proc/{PARENT}/environ').read())", "PermissionError"),
    ("reads files", "return len(open('/etc/passwd').read())", "PermissionError"),
    ("fills the disk", "open('big', 'wb').write(b'x' * 2**20)", "PermissionError"),
    ("fills another folder", "open('/tmp/vdiff-harm', 'wb').write(b'x' * 2**20)", "PermissionError"),
    ("takes all memory", "return len('x' * 10**10) > 0", "512 MB of memory"),
    ("leaves", "raise SystemExit(0)", "SystemExit"),
    ("dies", "libc.abort()", "without an answer"),
    ("talks too much", "os.write(3, b'x' * 10**6)", "without an answer"),
    ("lies", "os.write(3, b'[1]'); os._exit(0)", "something else"),
    ("gives no score", "return 'yes'", "not true, false or a number"),
    ("gives no number", "return float('nan')", "not true, false or a number"),
]


@pytest.mark.parametrize("body,says", [(b, s) for _, b, s in HARM], ids=[name for name, _, _ in HARM])
def test_harm_is_refused_and_said(body: str, says: str | None) -> None:
    verdict = grade(body)
    if says is None:  # the call itself says no, and the code could go on
        assert (verdict.passed, verdict.error) == (False, None)
    else:
        assert verdict.passed is None and verdict.error is not None
        assert verdict.error["code"] == "grader_failed" and says in verdict.error["message"]


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(1000)", "libc.pause()"])
def test_code_that_never_ends_is_ended(body: str) -> None:
    verdict = grade(body)
    assert verdict.error == {"code": "grader_timeout", "message": "not done after 1 s"}


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its own: other runs on this machine make such folders too
    grade("import signal; signal.setitimer(signal.ITIMER_REAL, 0); libc.pause()")  # the parent's clock ends it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "source,says",
    [("def (", "SyntaxError"), ("x = 1", "no function grade"), ("import nothing", "ModuleNotFoundError"),
     ("while True: pass", "not done after 1 s"), ("def grade(o, r, i): return True", None)],
)  # fmt: skip
def test_sources_are_checked_before_they_are_accepted(source: str, says: str | None) -> None:
    found = asyncio.run(sandbox.check(grader(source)))
    assert (found is None) if says is None else (says in (found or ""))
