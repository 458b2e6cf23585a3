"""Liveness of a process without a port, shown by the age of a file on its machine.

Heartbeats in PostgreSQL tell it too, but not while PostgreSQL is away: whoever restarts processes
for their heartbeats then restarts all of them. The file lies in the folder for temporary files. In
a container it is the process's own, and outlives it: a pod's volumes stay when a container of it
starts again. Several workers of one machine share it.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

STALE_SECONDS = 120.0  # a round may wait that long for a database that hangs


def alive_file(part: str) -> Path:
    """Args: part: worker or deliver."""
    return Path(tempfile.gettempdir(), f"vdiff-{part}.alive")


def begin(part: str) -> None:
    """Before anything is loaded: what an earlier process left says nothing of this one."""
    with suppress(OSError):
        alive_file(part).unlink()


def turn(part: str) -> None:
    """Another round of the loop; nothing where no file can be written."""
    with suppress(OSError):
        # Not through a link that somebody else may have laid there.
        fd = os.open(
            alive_file(part), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
        )
        try:
            os.utime(fd)
        finally:
            os.close(fd)


def stale_seconds(heartbeat_seconds: float) -> float:
    """Return the age from which a turn counts as missing; larger for loops that turn rarely."""
    return max(STALE_SECONDS, 3 * heartbeat_seconds)


def seconds_since_turn(part: str) -> float | None:
    """None: there was none on this machine."""
    try:
        return max(0.0, time.time() - alive_file(part).stat().st_mtime)
    except OSError:
        return None
