"""Children that end with their parent: a free port, a bounded wait, a stop that escalates."""

from __future__ import annotations

import ctypes
import errno
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import ConfigurationError

_PR_SET_PDEATHSIG = 1


# Below the ports that kernels give to outgoing connections (from 32768 on Linux, 49152 elsewhere):
# what is free here stays so until the server that was given it listens, unless somebody asks for
# that very port.
_PORTS = (15_000, 32_768)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    for candidate in (random.randrange(*_PORTS) for _ in range(100)):
        try:
            return _bound(host, candidate)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
    return _bound(host, 0)


def _bound(host: str, port: int) -> int:
    """Bind a port (0: any) for a moment. Raises OSError when it is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


def die_with_parent(signal_number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """A preexec_fn after which the kernel signals the child when its parent is gone (Linux; None
    elsewhere).

    The signal comes when the parent's *thread* that started the child ends, so start children from
    the main thread.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def apply() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal_number)

    return apply


def stop_process(process: subprocess.Popen[bytes], first: int, seconds: float) -> None:
    """Signal, wait, kill. Returns when the process is gone."""
    if process.poll() is not None:
        return
    process.send_signal(first)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(
    ready: Callable[[], bool],
    process: subprocess.Popen[bytes],
    what: str,
    log: Path,
    seconds: float,
) -> None:
    """Poll until ready. Raises ConfigurationError with the log's last line when the process ends or
    time runs out.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
            state = (
                f"ended with code {ended}"
                if ended is not None
                else f"is not ready after {seconds:.0f} s"
            )
            stop_process(process, signal.SIGTERM, 3)
            raise ConfigurationError(
                f"{what} {state}: {lines[-1] if lines else 'no output'} (see {log})"
            )
        time.sleep(0.05)
