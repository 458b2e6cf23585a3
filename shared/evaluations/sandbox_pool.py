"""The sandboxes that one host may run at once, shared by all API processes of the host.

A slot is an advisory lock on a file (`flock`) in a folder of the user. The kernel frees the slot of
a process that dies. One tenant holds all slots but one at most: slow graders of one tenant leave a
sandbox to the others.

The pool counts sandboxes; `shared.evaluations.sandbox` runs them.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from shared.errors import VDiffError

POLL_SECONDS = 0.05
WAIT_SECONDS = 10.0  # how long a request waits for a slot
WAITING_MAX = 32  # requests of one process that wait for a slot
BUCKETS = 256  # lock files of tenants; two tenants in one bucket share their part of the slots


class SandboxesBusy(VDiffError):
    """Every sandbox of the host is in use."""

    code = "sandboxes_busy"
    http_status = 503
    retryable = True


def default_folder() -> Path:
    return Path(tempfile.gettempdir(), f"vdiff-sandboxes-{os.getuid()}")


class SandboxPool:
    """Slots for sandboxes; every process of the host that uses the same folder shares them."""

    def __init__(self, slots: int, *, memory_mb: int, folder: Path | None = None) -> None:
        self.slots = slots
        self.memory_mb = memory_mb  # that one sandbox may take, whatever its grader asks for
        self._folder = default_folder() if folder is None else folder
        self._waiting = 0

    @asynccontextmanager
    async def slot(self, tenant: str, *, is_request: bool = False) -> AsyncIterator[None]:
        """Hold one slot while the block runs.

        Args:
            is_request: a client waits: give up after `WAIT_SECONDS`, or at once behind
                `WAITING_MAX` others. Without it the caller waits as long as it takes.

        Raises:
            SandboxesBusy
        """
        held = await self._take(tenant, is_request=is_request)
        try:
            yield
        finally:
            for fd in held:
                os.close(fd)

    async def _take(self, tenant: str, *, is_request: bool) -> list[int]:
        if (held := self._try(tenant)) is not None:
            return held
        if is_request and self._waiting >= WAITING_MAX:
            raise SandboxesBusy("too many requests wait for a sandbox; try again later")
        self._waiting += is_request
        try:
            async with asyncio.timeout(WAIT_SECONDS if is_request else None):
                while (held := self._try(tenant)) is None:
                    await asyncio.sleep(POLL_SECONDS)
                return held
        except TimeoutError as exc:
            message = f"no sandbox became free within {WAIT_SECONDS:g} seconds; try again later"
            raise SandboxesBusy(message) from exc
        finally:
            self._waiting -= is_request

    def _try(self, tenant: str) -> list[int] | None:
        """Take the tenant's part and a slot, or nothing."""
        bucket = int.from_bytes(hashlib.sha256(tenant.encode()).digest()[:4], "big") % BUCKETS
        part = self._lock_one([f"tenant-{bucket}-{i}" for i in range(max(1, self.slots - 1))])
        if part is None:
            return None
        slot = self._lock_one([f"slot-{i}" for i in range(self.slots)])
        if slot is None:
            os.close(part)
            return None
        return [part, slot]

    def _lock_one(self, names: list[str]) -> int | None:
        """Lock the first file that nobody holds; return its descriptor."""
        folder = self._open_folder()
        try:
            for name in names:
                fd = os.open(
                    name,
                    os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                    0o600,
                    dir_fd=folder,
                )
                with suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return fd
                os.close(fd)
        finally:
            os.close(folder)
        return None

    def _open_folder(self) -> int:
        """Open the folder, made if needed. Raises SandboxesBusy: the folder belongs to another
        user.
        """
        with suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        about = os.fstat(fd)
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o022:
            os.close(fd)
            raise SandboxesBusy(
                f"{self._folder} belongs to another user, so this process cannot count sandboxes"
            )
        return fd
