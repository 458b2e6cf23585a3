"""Faults inside a process of the product: a request that kills its worker, and background threads
that raise.

`tests.chaos.launch` installs these before the program starts; the product has no switch for them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KILLER_SEED = 66_666  # a request with this seed kills the process that runs it
LOOPS = frozenset(
    {
        "vdiff-sweeper",
        "vdiff-housekeeping",
        "vdiff-heartbeat",
        "vdiff-dispatcher",
        "vdiff-pump",
        "vdiff-cleaner",
        "vdiff-relay",
        "vdiff-cancels",
        "vdiff-express",
    }
)
KILL_AFTER_SECONDS = 0.3  # so that it shares the batch with others first


class PlantedError(RuntimeError):
    """The error that a background thread raises while the trigger file names it."""


def kill_on_seed() -> None:
    """End the worker with SIGKILL shortly after its engine takes a request with KILLER_SEED."""
    from worker.engine.engine import VDiffEngine

    submit = VDiffEngine.submit

    def deadly(
        self: VDiffEngine, request_id: str, prompt_token_ids: Any, params: Any, **given: Any
    ) -> Any:
        handle = submit(self, request_id, prompt_token_ids, params, **given)
        if params.seed == KILLER_SEED:
            timer = threading.Timer(KILL_AFTER_SECONDS, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return handle

    VDiffEngine.submit = deadly  # type: ignore[method-assign]


def raise_in_threads(trigger: Path) -> None:
    """Make each use of the database raise in the threads whose names begin with the trigger file's
    text.

    The file is read at each use; without it nothing happens.
    """
    from shared.db.session import Database

    def guarded(method: Callable[[Any], Any]) -> Any:
        @contextmanager
        def session(self: Database) -> Iterator[Any]:
            try:
                prefix = trigger.read_text()
            except OSError:
                prefix = ""
            name = threading.current_thread().name
            if prefix and name in LOOPS and name.startswith(prefix):
                raise PlantedError(f"planted in {name}")
            with method(self) as opened:
                yield opened

        return session

    Database.read = guarded(Database.read)  # type: ignore[method-assign]
    Database.write = guarded(Database.write)  # type: ignore[method-assign]
