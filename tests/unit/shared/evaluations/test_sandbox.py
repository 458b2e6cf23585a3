"""Foreign code in the real sandbox: it may think, and nothing else."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.evaluations import sandbox
from shared.evaluations.grader_requests import parse_graders
from shared.evaluations.graders import Grader, Verdict
from shared.evaluations.sandbox_child import NOBODY
from shared.evaluations.sandbox_pool import SandboxPool

HEAD = "import ctypes, os, _thread\nlibc = ctypes.CDLL(None)\ndef grade(output, reference, item):\n    "
PARENT = os.getpid()


def grader(source: str, **options: Any) -> Grader:
    value = [{"type": "code", "source": source, "timeout_seconds": 1, **options}]
    return parse_graders(value, code_allowed=True)[0]


@pytest.fixture(autouse=True)
def pool(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> SandboxPool:
    """A pool of its own: other runs on this machine have sandboxes too."""
    pool = SandboxPool(3, memory_mb=2048, folder=tmp_path_factory.mktemp("pool") / "slots")
    monkeypatch.setattr(sys.modules[__name__], "POOL", pool)
    return pool


POOL = SandboxPool(3, memory_mb=2048)


def grade(body: str, output: str = "42", **options: Any) -> Verdict:
    item = {"reference": "42", "x": 3}
    return asyncio.run(sandbox.grade(grader(HEAD + body, **options), output, item, POOL, "tenant"))


def test_code_grades() -> None:
    assert grade("return output == reference and item['x'] == 3").passed is True
    assert grade("return output == reference", output="41").passed is False
    half = grade("return 0.5")
    assert (half.passed, half.score) == (False, 0.5)
    assert grade("return 0.5", pass_at=0.5).passed is True
    assert grade("exec('def f(x): return x + 1', globals()); return f(1) == 2").passed is True


HARM = [
    ("forks", "os.fork()", "PermissionError"),
    ("waits on files", "return libc.epoll_create1(0) >= 0", None),
    ("takes a ring", "return libc.syscall(425, 1, None) >= 0", None),
    ("forks past Python", "return libc.fork() >= 0", None),
    ("starts a thread", "_thread.start_new_thread(print, ())", "can't start new thread"),
    ("starts a program", "os.execv('/bin/sh', ['sh', '-c', 'exit 0'])", "PermissionError"),
    ("opens a socket", "return libc.socket(2, 1, 0) >= 0", None),
    ("kills", f"os.kill({PARENT}, 9)", "PermissionError"),
    ("reads secrets", f"return len(open('/proc/{PARENT}/environ').read())", "PermissionError"),
    ("reads files", "return len(open('/etc/passwd').read())", "PermissionError"),
    ("fills the disk", "open('big', 'wb').write(b'x' * 2**20)", "PermissionError"),
    (
        "fills another folder",
        "open('/tmp/vdiff-harm', 'wb').write(b'x' * 2**20)",
        "PermissionError",
    ),
    ("takes all memory", "return len('x' * 10**10) > 0", "512 MB of memory"),
    ("leaves", "raise SystemExit(0)", "SystemExit"),
    ("dies", "libc.abort()", "without an answer"),
    ("talks too much", "os.write(3, b'x' * 10**6)", "without an answer"),
    ("lies", "os.write(3, b'[1]'); os._exit(0)", "something else"),
    ("lies about its score", "os.write(3, b'{\"score\": NaN}'); os._exit(0)", "something else"),
    (
        "lies about its error",
        'os.write(3, b\'{"error": [1], "code": {}}\'); os._exit(0)',
        "something else",
    ),
    ("gives no score", "return 'yes'", "not true, false or a number"),
    ("gives no number", "return float('nan')", "not true, false or a number"),
]


@pytest.mark.parametrize(
    "body,says", [(b, s) for _, b, s in HARM], ids=[name for name, _, _ in HARM]
)
def test_harm_is_refused_and_said(body: str, says: str | None) -> None:
    verdict = grade(
        body, timeout_seconds=20
    )  # none of it waits for time to run out, however busy the machine
    if says is None:  # the call itself says no, and the code could go on
        assert (verdict.passed, verdict.error) == (False, None)
    else:
        assert verdict.passed is None and verdict.error is not None
        assert verdict.error["code"] == "grader_failed" and says in verdict.error["message"]


@pytest.fixture
def file_of_its_user() -> Iterator[Path]:
    """A file that the sandbox's user owns, in a folder that it may enter: what the user may, the
    sandbox still may not.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "mine")
        path.write_bytes(b"abc")
        os.chmod(path, 0o640)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        yield path


@pytest.mark.parametrize(
    "change",
    [
        "os.truncate(path, 0)",
        "os.chmod(path, 0o777)",
        "os.utime(path, (1, 1))",
        "os.chown(path, os.getuid(), os.getgid())",
        "os.setxattr(path, 'user.x', b'1')",
        "os.rename(path, path + '2')",
        "os.link(path, path + '2')",
        "os.unlink(path)",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.open(path, os.O_WRONLY)",
        "os.mkdir(path + '2')",
        "os.symlink(path, path + '2')",
        "os.mkfifo(path + '2')",
        "os.ftruncate(3, 0)",
        "os.fchmod(3, 0o777)",
    ],
)
def test_files_of_its_own_user_stay_as_they_are(file_of_its_user: Path, change: str) -> None:
    before = file_of_its_user.stat()
    verdict = grade(
        f"path = {str(file_of_its_user)!r}; assert os.stat(path).st_size == 3; {change}"
    )
    assert verdict.error is not None and "PermissionError: [Errno 1]" in verdict.error["message"]
    after = file_of_its_user.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )
    assert (
        file_of_its_user.read_bytes() == b"abc"
        and len(list(file_of_its_user.parent.iterdir())) == 1
    )


@pytest.mark.parametrize(
    "call",
    [
        "libc.fcntl(3, 8, PARENT)",
        "libc.fcntl(3, 10, 9)",
        "libc.fcntl(3, 4, 0o20000)",  # F_SETOWN, F_SETSIG, O_ASYNC
        "libc.ioctl(3, 0x8901, ctypes.byref(ctypes.c_int(PARENT)))",
        "libc.ioctl(3, 0x5452, ctypes.byref(ctypes.c_int(1)))",
    ],
)
def test_nobody_is_signalled_by_way_of_a_descriptor(call: str) -> None:
    """FIOSETOWN and FIOASYNC are the last two."""
    body = "libc = ctypes.CDLL(None, use_errno=True); assert libc.fcntl(3, 1) >= 0"
    body += f"; return ({call.replace('PARENT', str(PARENT))}, ctypes.get_errno()) == (-1, 1)"
    assert grade(body).passed is True


def test_the_standard_library_works_inside() -> None:
    body = """import hashlib, random, re, datetime, decimal, time, threading, calendar, secrets, io, csv
    time.sleep(0.001); secrets.token_hex(3); random.random(); datetime.datetime.now(); threading.Lock().acquire()
    assert re.fullmatch('(a+)+', 'aaa') and hashlib.sha256(b'x').hexdigest() and os.cpu_count() and time.process_time() >= 0
    return decimal.Decimal(output) == decimal.Decimal(reference)"""
    assert grade(body).passed is True


def test_what_it_says_can_be_stored() -> None:
    """PostgreSQL's jsonb holds neither NUL nor half a character: a message with one would keep its
    evaluation from its end.
    """
    verdict = grade("raise ValueError('a\\x00b\\ud800c')")
    assert verdict.to_json() == {
        "passed": None,
        "error": {"code": "grader_failed", "message": "ValueError: a\ufffdb?c"},
    }


@pytest.mark.parametrize(
    "body", ["while True: pass", "import time; time.sleep(1000)", "libc.pause()"]
)
def test_code_that_never_ends_is_ended(body: str) -> None:
    verdict = grade(body)
    assert verdict.error == {"code": "grader_timeout", "message": "not done after 1 s"}


def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # its own: other runs on this machine make such folders too
    ignores = (
        "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)\n    while True: libc.pause()"
    )
    verdict = grade(ignores)  # the parent's clock ends it
    assert verdict.error == {"code": "grader_timeout", "message": "not done after 1 s"}
    assert list(tmp_path.iterdir()) == []


RUNS_FOREVER = "while True: pass\ndef grade(output, reference, item): return True"


@pytest.mark.parametrize(
    "source,says",
    [
        ("def (", "SyntaxError"),
        ("x = 1", "no function grade"),
        ("def f():\n    grade = 1", "no function grade"),
        ("print(grade)", "no function grade"),
        ("x = \0", "null bytes"),
        ("(" * 20_000 + ")" * 20_000, "too"),
        ("def grade(o, r, i): return True", None),
        ("grade = lambda o, r, i: True", None),
        ("from operator import eq as grade", None),
        ("if True:\n    def grade(o, r, i): return True", None),
        (RUNS_FOREVER, None),
        ("import nothing\ndef grade(o, r, i): return True", None),
    ],
)
def test_sources_are_compiled_before_they_are_accepted_and_not_run(
    source: str, says: str | None, pool: SandboxPool
) -> None:
    found = asyncio.run(sandbox.check(["def grade(o, r, i): return 1", source], pool, "tenant"))
    assert (
        (found is None)
        if says is None
        else (found is not None and found.index == 1 and says in found.message)
    )


def children_of_this_process() -> list[str]:
    pids, found = list[str](), list[str]()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended meanwhile
            pids += (task / "children").read_text().split()
    for pid in pids:
        with suppress(OSError):
            if b"sandbox_child" in Path("/proc", pid, "cmdline").read_bytes():
                found.append(pid)
    return found


async def test_the_kernel_ends_a_sandbox_before_anything_else(pool: SandboxPool) -> None:
    slow = grader(HEAD + "import time; time.sleep(60)", timeout_seconds=60)
    task = asyncio.create_task(sandbox.grade(slow, "42", {"reference": "42"}, pool, "tenant"))
    score = None
    for _ in range(1000):
        for pid in children_of_this_process():
            score = Path("/proc", pid, "oom_score_adj").read_text().strip()
        if score == "1000":
            break
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert score == "1000"
    assert children_of_this_process() == []  # whoever stops waiting ends the sandbox


async def test_no_more_sandboxes_than_slots(pool: SandboxPool) -> None:
    """Twelve answers of four tenants, graded by two processes' pools at once."""
    most = 0
    pools = [SandboxPool(2, memory_mb=512, folder=pool._folder) for _ in range(2)]
    one = grader(HEAD + "import time; time.sleep(0.02); return True", timeout_seconds=20)
    grades = [
        sandbox.grade(one, "42", {"reference": "42"}, pools[i % 2], f"tenant-{i % 4}")
        for i in range(12)
    ]
    before = set(children_of_this_process())  # of other tests in this process
    together = asyncio.gather(*grades)
    while not together.done():
        most = max(most, len(set(children_of_this_process()) - before))
        await asyncio.sleep(0.002)
    assert [verdict.passed for verdict in await together] == [True] * 12
    assert 1 <= most <= 2


def test_a_grader_gets_no_more_memory_than_the_pool_allows(pool: SandboxPool) -> None:
    pool.memory_mb = 128
    verdict = grade("return len(b'x' * 200_000_000) > 0", memory_mb=2048, timeout_seconds=20)
    assert verdict.error is not None and "128 MB of memory" in verdict.error["message"]
