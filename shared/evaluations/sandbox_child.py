"""What runs inside the sandbox: `python -I -S -B sandbox_child.py LIMITS`; the task on stdin, one line of JSON on stdout.

It shuts itself in before it looks at foreign code, and refuses to run when it cannot: no new process or program, no network, no
signal to others (seccomp), no file but the interpreter's own to read and none to write (Landlock), bounded memory, CPU time and
descriptors (rlimits), and under root another user. Standard library alone, no import of vdiff: it starts in 20 ms.
"""

from __future__ import annotations

# ruff: noqa: F401
# What graders are likely to import: here they are loaded before the process shuts itself in, which makes them quick to have.
# Afterwards other modules of the standard library may still be read.
import ast
import base64
import bisect
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import decimal
import difflib
import fractions
import functools
import hashlib
import heapq
import html
import io
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import resource
import signal
import statistics
import string
import struct
import sys
import textwrap
import time
import typing
import unicodedata

NOBODY = 65534
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_ALLOW, _RET_EPERM = 0x7FFF0000, 0x00050001
# AUDIT_ARCH of the machine, then the numbers of the system calls that are refused.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {
        "socket": 41, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101,
        "setrlimit": 160, "tkill": 200, "tgkill": 234, "unshare": 272, "prlimit64": 302, "process_vm_readv": 310,
        "process_vm_writev": 311, "setns": 308, "bpf": 321, "execveat": 322, "userfaultfd": 323, "mount": 165,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "keyctl": 250, "shmget": 29,
        "msgget": 68, "memfd_create": 319, "mq_open": 240,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "socketpair": 199, "clone": 220, "execve": 221, "kill": 129, "ptrace": 117, "setrlimit": 164,
        "tkill": 130, "tgkill": 131, "unshare": 97, "prlimit64": 261, "process_vm_readv": 270, "process_vm_writev": 271,
        "setns": 268, "bpf": 280, "execveat": 281, "userfaultfd": 282, "mount": 40, "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "keyctl": 219, "shmget": 194, "msgget": 186,
        "memfd_create": 279, "mq_open": 180,
    }),
}  # fmt: skip
_BOTH = {"pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438}
_X32 = 0x40000000  # a second door to the same calls on x86_64
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_FS_ALL = (1 << 13) - 1  # of the first ABI: execute, write, read, and all that makes or removes
_FS_READ = (1 << 2) | (1 << 3)  # read_file, read_dir


class Unavailable(Exception):
    """This machine cannot shut us in."""


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _limit(memory_mb: int, cpu_seconds: int) -> None:
    for what, value in (
        (resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (value, value))


def _drop_root() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _see_only(libc: ctypes.CDLL, folders: list[str]) -> None:
    """Landlock: of all files those below `folders`, to be read."""
    handled = struct.pack("=Q", _FS_ALL)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    if rules < 0:
        raise Unavailable("the kernel has no Landlock (Linux 5.13), or it is turned off")
    for folder in folders:
        try:
            fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not on this machine
        rule = struct.pack("=Qi", _FS_READ, fd)
        if libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0) != 0:
            raise Unavailable(f"Landlock refuses {folder}")
        os.close(fd)
    if libc.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
        raise Unavailable("Landlock does not restrict this process")
    os.close(rules)


def _refuse_calls(libc: ctypes.CDLL) -> None:
    """seccomp: EPERM for everything in the tables above, and for any other machine's calls."""
    machine = platform.machine()
    if machine not in _MACHINES:
        raise Unavailable(f"no table of system calls for {machine}")
    arch, calls = _MACHINES[machine]
    numbers = [*calls.values(), *_BOTH.values()]
    count = len(numbers)
    # A jump counts the lines that it leaves out; the last two are: allow, refuse.
    code = [
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 0, count + 3, arch),  # another one: refuse
        (0x20, 0, 0, 0),  # load the call's number
        (0x35, count + 1, 0, _X32),  # so high: refuse
        *((0x15, count - i, 0, number) for i, number in enumerate(numbers)),
        (0x06, 0, 0, _RET_ALLOW),
        (0x06, 0, 0, _RET_EPERM),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    program = _Filter(len(code), ctypes.cast(packed, ctypes.c_void_p))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise Unavailable("the kernel takes no seccomp filter")


def shut_in(memory_mb: int, cpu_seconds: int) -> None:
    """Raises Unavailable; then nothing foreign may run."""
    if sys.platform != "linux":
        raise Unavailable(f"graders that run code need Linux, not {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    _limit(memory_mb, cpu_seconds)
    _drop_root()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise Unavailable("the kernel does not take PR_SET_NO_NEW_PRIVS")
    _see_only(libc, [os.path.join(sys.base_prefix, sys.platlibdir), os.path.join(sys.base_prefix, "lib"), "/usr/lib",
                     "/lib", "/usr/share/zoneinfo"])  # fmt: skip
    _refuse_calls(libc)


def run(task: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Compile the source; with an answer, grade it."""
    namespace: dict[str, typing.Any] = {"__name__": "grader"}
    exec(compile(task["source"], "grader", "exec"), namespace)
    grade = namespace.get("grade")
    if not callable(grade):
        return {"error": "the source defines no function grade(output, reference, item)"}
    if "output" not in task:
        return {"ok": True}
    score = grade(task["output"], task["reference"], task["item"])
    if isinstance(score, bool):
        return {"score": float(score)}
    if isinstance(score, int | float) and math.isfinite(score) and 0 <= score <= 1:
        return {"score": float(score)}
    return {"error": f"grade gave {score!r:.100}, not true, false or a number from 0 to 1"}


def main() -> None:
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    task = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    try:
        shut_in(memory_mb, math.ceil(seconds) + 1)
    except (Unavailable, OSError, ValueError) as exc:
        os.write(answer, json.dumps({"unavailable": str(exc)}).encode())
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process; who turns it off meets the parent's clock
    try:
        made = run(task)
    except MemoryError:
        made = {"error": f"more than {memory_mb} MB of memory"}
    except BaseException as exc:  # whatever foreign code raises, SystemExit too, is its answer
        made = {"error": f"{type(exc).__name__}: {exc}"[:400]}
    os.write(answer, json.dumps(made).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
