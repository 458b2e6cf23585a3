"""Decide what a database error means: an outage that a later try may not meet, and a connection not
to be used again.

PostgreSQL applies `ALTER ROLE/DATABASE ... SET default_transaction_read_only` to new sessions only.
A pool that keeps sessions opened before a failover therefore refuses writes long after the database
takes them again. Two rules prevent it:

1. An error that condemns a connection (`condemns`) closes it, and every other connection of the
pool before its next use. 2. A unit of work that writes does not begin on a pooled connection that
reports itself read-only: a new one is opened.
   Both drivers know this without a round trip, because PostgreSQL reports these settings to the
   client.

`shared.db.session` applies `watch` to every pooled engine, so the API, the workers, the sender and
the command line agree.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    OperationalError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

# Classes of SQLSTATE that a later try may not meet: connection, unsupported feature (a statement
# prepared before a migration), invalid transaction (read-only after a failover), authorization and
# unknown database (a server that is being restored), rollback (deadlock), resources, wrong state,
# operator intervention, system, configuration.
_PASSING = ("08", "0A", "25", "28", "3D", "40", "53", "55", "57", "58", "F0")
# Classes of SQLSTATE of values that no later try can store: bad data, a constraint, a limit (a row
# too long).
_REFUSALS = ("22", "23", "54")
# The session itself is unusable: it is read-only, it timed out in a transaction, or the server ends
# it.
_CONDEMNED = ("25006", "25P03", "57P01", "57P02", "57P03", "57P04", "57P05")
_REPORTED = ("default_transaction_read_only", "in_hot_standby")
_REPLACED_MAX = 64  # pooled connections that one unit of work replaces at most
_USED = "vdiff_used"


def sqlstate(exc: BaseException) -> str | None:
    """Return the SQLSTATE of a driver's error, or None."""
    state = getattr(exc, "sqlstate", None)
    return None if state is None else str(state)


def is_refusal(exc: BaseException) -> bool:
    """Return whether the values of a statement cannot be stored at all, by the server or by the
    driver.

    The same statement with the same values fails again, wherever it is executed.
    """
    if isinstance(exc, DBAPIError):
        state = None if exc.orig is None else sqlstate(exc.orig)
        if state is not None:
            return state[:2] in _REFUSALS
        # Without a state the driver refused the value itself, a NUL character for instance.
        return isinstance(exc, DataError) or isinstance(
            getattr(exc.orig, "__cause__", None), ValueError
        )
    # SQLAlchemy wraps what a bind processor raises; an encoder's own error comes as it is.
    return isinstance(exc.orig if isinstance(exc, StatementError) else exc, TypeError | ValueError)


def is_outage(exc: BaseException) -> bool:
    """Return whether the database was away or busy, so that the same statement may succeed later.

    False means that it refused the statement: a bug of ours.
    """
    if is_refusal(exc):
        return False
    if not isinstance(exc, DBAPIError):
        return isinstance(exc, DisconnectionError | PoolTimeout | OSError)
    state = None if exc.orig is None else sqlstate(exc.orig)
    if state is None:  # the server has not answered
        return exc.connection_invalidated or isinstance(exc, OperationalError | InterfaceError)
    return exc.connection_invalidated or state[:2] in _PASSING


def condemns(exc: BaseException) -> bool:
    """Return whether the connection that raised `exc` must not be used again."""
    if isinstance(exc, TimeoutError):
        return True  # the driver stopped waiting for a server that may be gone
    state = sqlstate(exc)
    return state is not None and (state in _CONDEMNED or state.startswith("08"))


def is_read_only(driver_connection: Any) -> bool:
    """Return whether the session last reported that it refuses writes; no round trip."""
    if hasattr(driver_connection, "get_settings"):  # asyncpg
        settings = driver_connection.get_settings()
        return any(getattr(settings, name, "off") == "on" for name in _REPORTED)
    info = driver_connection.info  # psycopg
    return any(info.parameter_status(name) == "on" for name in _REPORTED)


def watch(engine: Engine) -> None:
    """Close condemned connections of the engine's pool, and begin no write on a stale read-only
    one.
    """
    event.listen(engine, "handle_error", _condemn)
    event.listen(engine, "engine_connect", _replace_read_only)


def _condemn(context: ExceptionContext) -> None:
    if condemns(context.original_exception):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = True


def _replace_read_only(connection: Connection) -> None:
    """Replace a connection that was used before and is read-only; a new one that is read-only too
    tells the truth.
    """
    writes = connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT"
    for _ in range(_REPLACED_MAX):
        driver = connection.connection.driver_connection
        used = _USED in connection.info
        connection.info[_USED] = True
        if not writes or not used or driver is None or not is_read_only(driver):
            return
        connection.invalidate()
