"""The program inside the sandbox: `python -I -S -B sandbox_child.py LIMITS`; the task on stdin, one
line of JSON on stdout.

It shuts itself in before it looks at foreign code, and refuses to run when it cannot: no system
call but the few that thinking needs (seccomp, a list of what is allowed: so no process, program,
network or signal, and nothing that makes, changes or marks a file), no file but the interpreter's
own to read and none to write (Landlock), bounded memory, CPU time and descriptors (rlimits), and
under root another user. Standard library alone, no import of vdiff: it starts in 20 ms.
"""

from __future__ import annotations

# ruff: noqa: F401
# What graders are likely to import: here they are loaded before the process shuts itself in, which
# makes them quick to have. Afterwards other modules of the standard library may still be read,
# where the user that it then is may read them.
import array
import ast
import base64
import bisect
import calendar
import cmath
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import decimal
import difflib
import enum
import fractions
import functools
import hashlib
import heapq
import html
import io
import itertools
import json
import math
import numbers
import operator
import os
import platform
import pprint
import random
import re
import resource
import secrets
import signal
import statistics
import string
import struct
import symtable
import sys
import textwrap
import threading
import time
import types
import typing
import unicodedata

NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_RET_ALLOW, _RET_EPERM = 0x7FFF0000, 0x00050001
# What an interpreter needs to compute, to look at the clock, and to read its own modules:
# everything else is refused. AUDIT_ARCH of the machine, then the numbers of the system calls that
# are allowed.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0,
            "write": 1,
            "close": 3,
            "stat": 4,
            "fstat": 5,
            "lstat": 6,
            "poll": 7,
            "lseek": 8,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "rt_sigaction": 13,
            "rt_sigprocmask": 14,
            "rt_sigreturn": 15,
            "pread64": 17,
            "readv": 19,
            "writev": 20,
            "access": 21,
            "select": 23,
            "sched_yield": 24,
            "mremap": 25,
            "madvise": 28,
            "dup": 32,
            "dup2": 33,
            "pause": 34,
            "nanosleep": 35,
            "getpid": 39,
            "exit": 60,
            "uname": 63,
            "getcwd": 79,
            "readlink": 89,
            "gettimeofday": 96,
            "getrusage": 98,
            "sysinfo": 99,
            "times": 100,
            "getuid": 102,
            "getgid": 104,
            "geteuid": 107,
            "getegid": 108,
            "getppid": 110,
            "sigaltstack": 131,
            "gettid": 186,
            "time": 201,
            "futex": 202,
            "sched_getaffinity": 204,
            "getdents64": 217,
            "restart_syscall": 219,
            "clock_gettime": 228,
            "clock_getres": 229,
            "clock_nanosleep": 230,
            "exit_group": 231,
            "newfstatat": 262,
            "readlinkat": 267,
            "faccessat": 269,
            "pselect6": 270,
            "ppoll": 271,
            "dup3": 292,
            "getrandom": 318,
            "membarrier": 324,
            "statx": 332,
            "rseq": 334,
            "faccessat2": 439,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "getcwd": 17,
            "dup": 23,
            "dup3": 24,
            "faccessat": 48,
            "close": 57,
            "getdents64": 61,
            "lseek": 62,
            "read": 63,
            "write": 64,
            "readv": 65,
            "writev": 66,
            "pread64": 67,
            "pselect6": 72,
            "ppoll": 73,
            "readlinkat": 78,
            "newfstatat": 79,
            "fstat": 80,
            "exit": 93,
            "exit_group": 94,
            "futex": 98,
            "nanosleep": 101,
            "clock_gettime": 113,
            "clock_getres": 114,
            "clock_nanosleep": 115,
            "sched_getaffinity": 123,
            "sched_yield": 124,
            "restart_syscall": 128,
            "sigaltstack": 132,
            "rt_sigaction": 134,
            "rt_sigprocmask": 135,
            "rt_sigreturn": 139,
            "times": 153,
            "uname": 160,
            "getrusage": 165,
            "gettimeofday": 169,
            "getpid": 172,
            "getppid": 173,
            "getuid": 174,
            "geteuid": 175,
            "getgid": 176,
            "getegid": 177,
            "gettid": 178,
            "sysinfo": 179,
            "brk": 214,
            "munmap": 215,
            "mremap": 216,
            "mmap": 222,
            "mprotect": 226,
            "madvise": 233,
            "getrandom": 278,
            "membarrier": 283,
            "statx": 291,
            "rseq": 293,
            "faccessat2": 439,
        },
    ),
}
# Allowed for some values of one argument: its index, the bits that count, the values. An `open` is
# to read; an `fcntl` neither names who is signalled (F_SETOWN, F_SETSIG) nor asks for signals
# (F_SETFL); an `ioctl` asks for a terminal, or closes on exec.
_ALL_BITS = 0xFFFFFFFF
_OPEN_CHANGES = (
    os.O_WRONLY
    | os.O_RDWR
    | os.O_CREAT
    | os.O_TRUNC
    | (getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY)
)
_FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_IOCTL = (0x5401, 0x5450, 0x5451)  # TCGETS, FIONCLEX, FIOCLEX
_Rule = tuple[int, int, tuple[int, ...]]
_SOME: dict[str, dict[int, _Rule]] = {
    "x86_64": {
        2: (1, _OPEN_CHANGES, (0,)),
        257: (2, _OPEN_CHANGES, (0,)),
        72: (1, _ALL_BITS, _FCNTL),
        16: (1, _ALL_BITS, _IOCTL),
    },
    "aarch64": {
        56: (2, _OPEN_CHANGES, (0,)),
        25: (1, _ALL_BITS, _FCNTL),
        29: (1, _ALL_BITS, _IOCTL),
    },
}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# What each version of Landlock's ABI can forbid, beside what the one before it could: 1 execute,
# write, read and all that makes or removes, 2 moving between folders, 3 truncating, 5 ioctl of
# devices; 4 TCP; 6 signals and abstract sockets of others.
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NET_ALL, _SCOPE_ALL = 0b11, 0b11
_FS_READ = (1 << 2) | (1 << 3)  # read_file, read_dir


class Unavailable(Exception):
    """This machine cannot shut us in."""


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _die_first() -> None:
    """Have the kernel end this process before any other of the host when memory runs out."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _limit(memory_mb: int, cpu_seconds: int) -> None:
    for what, value in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def _drop_root() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _see_only(libc: ctypes.CDLL, folders: list[str]) -> None:
    """Landlock: of all files those below `folders`, to be read."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        raise Unavailable("the kernel has no Landlock (Linux 5.13), or it is turned off")
    handled = struct.pack("=Q", (1 << _FS_BITS[min(version, max(_FS_BITS))]) - 1)
    if version >= 4:
        handled += struct.pack("=Q", _NET_ALL)
    if version >= 6:
        handled += struct.pack("=Q", _SCOPE_ALL)
    rules = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    if rules < 0:
        raise Unavailable(f"the kernel's Landlock (version {version}) takes no rules")
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


def _allow_calls(libc: ctypes.CDLL) -> None:
    """seccomp: EPERM for everything that is not in the tables above, and for any other machine's
    calls.
    """
    machine = platform.machine()
    if machine not in _MACHINES or sys.byteorder != "little":
        raise Unavailable(f"no table of system calls for {machine}")
    arch, calls = _MACHINES[machine]
    load, same, mask, back = 0x20, 0x15, 0x54, 0x06
    allow, refuse = (back, 0, 0, _RET_ALLOW), (back, 0, 0, _RET_EPERM)
    # A jump counts the lines that it leaves out. x86_64's second door to the same calls has other
    # numbers, and is shut.
    code = [(load, 0, 0, 4), (same, 1, 0, arch), refuse, (load, 0, 0, 0)]
    for number in calls.values():
        code += [(same, 0, 1, number), allow]
    for number, (index, bits, values) in _SOME[machine].items():
        code += [
            (same, 0, 3 + 2 * len(values), number),
            (load, 0, 0, 16 + 8 * index),
            (mask, 0, 0, bits),
        ]
        for value in values:
            code += [(same, 0, 1, value), allow]
        code += [refuse]
    code += [refuse]
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
    _die_first()
    _limit(memory_mb, cpu_seconds)
    _drop_root()
    # After the change of user, which clears it: a parent that dies takes this process with it, and
    # frees the slot.
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise Unavailable("the kernel does not take PR_SET_PDEATHSIG")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise Unavailable("the kernel does not take PR_SET_NO_NEW_PRIVS")
    _see_only(
        libc,
        [
            os.path.join(sys.base_prefix, sys.platlibdir),
            os.path.join(sys.base_prefix, "lib"),
            "/usr/lib",
            "/lib",
            "/usr/share/zoneinfo",
        ],
    )
    _allow_calls(libc)


def check(sources: list[str]) -> dict[str, typing.Any]:
    """Compile every source and look for `grade` among its names; nothing of it runs."""
    for number, source in enumerate(sources):
        try:
            compile(source, "grader", "exec")
            names = symtable.symtable(source, "grader", "exec")
            if "grade" not in names.get_identifiers() or not (
                names.lookup("grade").is_assigned() or names.lookup("grade").is_imported()
            ):
                return {
                    "error": "the source defines no function grade(output, reference, item)",
                    "grader": number,
                }
        except MemoryError:
            return {"error": "the source is nested too deeply to be compiled", "grader": number}
        except BaseException as exc:
            return {"error": f"{type(exc).__name__}: {exc}"[:400], "grader": number}
    return {"ok": True}


def run(task: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Compile the source; with an answer, grade it."""
    namespace: dict[str, typing.Any] = {"__name__": "grader"}
    exec(compile(task["source"], "grader", "exec"), namespace)
    grade = namespace.get("grade")
    if not callable(grade):
        return {"error": "the source defines no function grade(output, reference, item)"}
    score = grade(task["output"], task["reference"], task["item"])
    if isinstance(score, bool):
        return {"score": float(score)}
    if isinstance(score, int | float) and math.isfinite(score) and 0 <= score <= 1:
        return {"score": float(score)}
    return {"error": f"grade gave {repr(score)[:100]}, not true, false or a number from 0 to 1"}


def main() -> None:
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    task = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    signal.setitimer(
        signal.ITIMER_REAL, seconds
    )  # ends the process; who ignores the signal meets the parent's clock
    try:
        shut_in(memory_mb, math.ceil(seconds) + 1)
    except (Unavailable, OSError, ValueError) as exc:
        os.write(answer, json.dumps({"unavailable": str(exc)}).encode())
        return
    try:
        made = check(task["sources"]) if "sources" in task else run(task)
    except MemoryError:
        made = {"error": f"more than {memory_mb} MB of memory"}
    except BaseException as exc:  # whatever foreign code raises, SystemExit too, is its answer
        made = {"error": f"{type(exc).__name__}: {exc}"[:400]}
    os.write(answer, json.dumps(made).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
