"""Work that may be large, done in chunks: each is a short transaction, and what is left waits for
the next slice.

A request that deletes much marks it (`deleted_at`), so that nobody sees it any more; housekeeping
removes the rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, Executable

from shared.db.session import Database

SLICE_SECONDS = 2.0  # of one duty, before the others have their turn


@dataclass(frozen=True, slots=True)
class Done:
    """The result of one slice."""

    count: int
    is_cut: bool  # there may be more


def in_chunks(do_chunk: Callable[[], int], size: int, stopping: threading.Event) -> Done:
    """Call `do_chunk`, which returns how many rows it did, until nothing is left or the slice is
    over.

    Args:
        size: rows of a full chunk; fewer mean that nothing is left.
        stopping: is set when the process ends.
    """
    ends_at = time.monotonic() + SLICE_SECONDS
    count = 0
    while not stopping.is_set():
        done = do_chunk()
        count += done
        if done < size:
            return Done(count, False)
        if time.monotonic() >= ends_at:
            break
    return Done(count, True)


def run_chunk(database: Database, statements: Sequence[Executable]) -> int:
    """Execute the first of the statements that has something to do; return its rows."""
    for statement in statements:
        with database.write() as session:
            result: Any = session.execute(statement)
        if isinstance(result, CursorResult) and result.rowcount > 0:
            return int(result.rowcount)
    return 0
