"""Writes that happen once and must not be lost: tried again until PostgreSQL answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from shared.background import describe_error
from shared.db.faults import is_outage, sqlstate
from shared.db.session import Database, WriteSession

WAIT_FIRST_SECONDS = 0.1
WAIT_MAX_SECONDS = 2.0
STEP_SECONDS = 0.1  # how late `give_up` may be noticed

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


def persist(
    database: Database,
    work: Callable[[WriteSession, bool], _T],
    *,
    give_up: Callable[[], bool] = lambda: False,
) -> _T:
    """Run `work` in a transaction until it is committed; return what it returned.

    `work(session, again)` may run several times. `again` says that an earlier transaction failed in
    an outage, maybe after PostgreSQL committed it: work that changes nothing then reads back what
    happened.

    Args:
        give_up: asked after every failure; True raises that failure.

    Raises:
        Exception: what the transaction raised, if it is no outage or `give_up` says so.
    """
    wait, failures = WAIT_FIRST_SECONDS, 0
    while True:
        try:
            with database.write() as session:
                made = work(session, failures > 0)
        except Exception as exc:
            if not is_outage(exc) or _gives_up(wait, give_up):
                raise
            failures += 1
            wait = min(2 * wait, WAIT_MAX_SECONDS)
            if failures == 1:
                state = sqlstate(getattr(exc, "orig", None) or exc)
                _log.warning("write_waits_for_database", error=describe_error(exc), sqlstate=state)
            continue
        if failures:
            _log.info("write_recovered", failures=failures)
        return made


def _gives_up(wait: float, give_up: Callable[[], bool]) -> bool:
    """Wait between two tries, with jitter; return True as soon as `give_up` does."""
    until = time.monotonic() + wait * random.uniform(0.75, 1.25)
    while not give_up():
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, STEP_SECONDS))
    return True
