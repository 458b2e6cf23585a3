"""Turn jsonb columns of large tables into json while the system runs.

ALTER COLUMN ... TYPE would rewrite a table under a lock that stops every statement. `prepare` adds
json columns beside the old ones, keeps them filled by a trigger, and fills the rows that exist in
short transactions. What is left for the migration's own transaction is `swap`: it drops and renames
columns, which reads no rows. A run that was interrupted goes on where it stopped. A statement that
meets a lock or a deadlock is tried again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, CursorResult, text
from sqlalchemy.exc import DBAPIError

from shared.db.faults import sqlstate

CHUNK = 1_000  # rows of one transaction
NAMED_NOT_NULL = (18,)  # the first PostgreSQL whose NOT NULL constraints have names
PASSING = ("40P01", "55P03")  # a deadlock, and `lock_timeout`
TRIES = 60  # of one statement, each of which waits for a lock as long as `lock_timeout` says
WAIT_MAX_SECONDS = 2.0


@dataclass(frozen=True)
class Converted:
    """A table and its columns.

    Args:
        key: the primary key, as SQL.
        required: the columns that are NOT NULL.
        checks: what else holds for the new columns: name of the constraint, and condition.
    """

    table: str
    key: str
    columns: tuple[str, ...]
    required: tuple[str, ...]
    checks: Mapping[str, str] = field(default_factory=dict)

    @property
    def trigger(self) -> str:
        """Return the name of the trigger that fills rows as they are written."""
        return f"{self.table}_fill_json"

    @property
    def function(self) -> str:
        """Return the name of the trigger's function."""
        return "vdiff_fill_json" if self.table == "jobs" else f"vdiff_fill_json_{self.table}"

    @property
    def constraints(self) -> dict[str, str]:
        """Return the constraints that `prepare` adds, in order."""
        given = {self.given(name): f"{name}_json IS NOT NULL" for name in self.required}
        return {**self.checks, **given}

    def given(self, column: str) -> str:
        """Return the name of the check that stands for NOT NULL until `swap`."""
        return f"{column}_json_given"

    @property
    def create_trigger(self) -> str:
        """Return the SQL that creates the trigger."""
        assignments = " ".join(f"NEW.{name}_json := NEW.{name}::json;" for name in self.columns)
        return f"""
            CREATE OR REPLACE FUNCTION {self.function}() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN {assignments} RETURN NEW; END $$;
            CREATE OR REPLACE TRIGGER {self.trigger} BEFORE INSERT OR UPDATE ON {self.table}
            FOR EACH ROW EXECUTE FUNCTION {self.function}();"""

    @property
    def fill(self) -> str:
        """Fill the chunk of rows behind the key `:after_0, ...`; return the last key, or no row if
        none is left.
        """
        names = [name.strip() for name in self.key.split(",")]
        same = " AND ".join(f"{self.table}.{name} = chunk.{name}" for name in names)
        values = ", ".join(f"{name}_json = {name}::json" for name in self.columns)
        after = ", ".join(f":after_{i}" for i in range(len(names)))
        return (
            f"WITH chunk AS (SELECT {self.key} FROM {self.table} WHERE ({self.key}) > ({after}) ORDER BY {self.key} "
            f"LIMIT {CHUNK} FOR UPDATE), "
            f"filled AS (UPDATE {self.table} SET {values} FROM chunk WHERE {same} "
            f"AND {self.table}.{self.required[0]}_json IS NULL) "
            f"SELECT {self.key} FROM chunk ORDER BY {', '.join(f'{name} DESC' for name in names)} LIMIT 1"
        )


JOBS = Converted(
    "jobs",
    "id",
    ("body", "params", "result"),
    ("body", "params"),
    {
        "result_when_succeeded_json": "(status = 'succeeded' AND purged_at IS NULL) = (result_json IS NOT NULL)"
    },
)
ITEMS = Converted("evaluation_items", "evaluation_id, number", ("data",), ("data",))
FIRST_KEYS: Mapping[str, tuple[Any, ...]] = {
    "jobs": ("",),
    "evaluation_items": ("", 0),
}  # before every key


def _execute(
    connection: Connection, statement: str, values: Mapping[str, Any] | None = None
) -> CursorResult[Any]:
    """Execute a statement that is a transaction of its own; try again what met a lock or a
    deadlock.

    In a transaction of the caller, which such an error ends, the first try is the only one.
    """
    tries = (
        TRIES if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT" else 1
    )
    for number in range(tries):
        try:
            return connection.execute(text(statement), values or {})
        except DBAPIError as exc:
            if exc.orig is None or sqlstate(exc.orig) not in PASSING or number == tries - 1:
                raise
            _pause(number)
    raise AssertionError("the last try returns or raises")


def _pause(number: int) -> None:
    """Wait between two tries, so that the others finish what they hold."""
    time.sleep(min(WAIT_MAX_SECONDS, 0.1 * 2**number) * random.uniform(0.75, 1.25))


def prepare(connection: Connection, table: Converted) -> None:
    """Add the json columns and fill them; each statement is a transaction where the connection
    commits by itself.
    """
    added = ", ".join(f"ADD COLUMN IF NOT EXISTS {name}_json json" for name in table.columns)
    _execute(connection, f"ALTER TABLE {table.table} {added}")
    _execute(connection, table.create_trigger)
    fill(connection, table)
    known = set(_execute(connection, _CONSTRAINTS, {"table": table.table}).scalars())
    for name, condition in table.constraints.items():
        if name not in known:
            _execute(
                connection,
                f"ALTER TABLE {table.table} ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID",
            )
        _execute(connection, f"ALTER TABLE {table.table} VALIDATE CONSTRAINT {name}")


def fill(connection: Connection, table: Converted) -> None:
    """Fill the rows that exist, a chunk a statement. The trigger fills the rows that come
    meanwhile.
    """
    after: tuple[Any, ...] | None = FIRST_KEYS[table.table]
    while after is not None:  # each chunk is behind the last key of the one before
        last = _execute(
            connection, table.fill, {f"after_{i}": key for i, key in enumerate(after)}
        ).one_or_none()
        after = None if last is None else tuple(last)


_CONSTRAINTS = "SELECT conname FROM pg_constraint WHERE conrelid = CAST(:table AS regclass)"


def is_prepared(connection: Connection, table: Converted) -> bool:
    """Return whether `prepare` has run to its end."""
    query = f"{_CONSTRAINTS} AND conname = :name AND convalidated"
    values = {"table": table.table, "name": list(table.constraints)[-1]}
    return connection.execute(text(query), values).one_or_none() is not None


def swap(connection: Connection, table: Converted) -> None:
    """Put the json columns in the place of the old ones. No row is read: validated checks stand for
    NOT NULL.
    """

    def alter(change: str) -> None:
        connection.execute(text(f"ALTER TABLE {table.table} {change}"))

    connection.execute(text(f"DROP TRIGGER {table.trigger} ON {table.table}"))
    connection.execute(text(f"DROP FUNCTION {table.function}()"))
    alter(", ".join(f"ALTER COLUMN {name}_json SET NOT NULL" for name in table.required))
    alter(", ".join(f"DROP CONSTRAINT {table.given(name)}" for name in table.required))
    alter(", ".join(f"DROP COLUMN {name}" for name in table.columns))
    for name in table.columns:
        alter(f"RENAME COLUMN {name}_json TO {name}")
        if (
            name in table.required
            and (connection.dialect.server_version_info or ()) >= NAMED_NOT_NULL
        ):
            alter(
                f"RENAME CONSTRAINT {table.table}_{name}_json_not_null TO {table.table}_{name}_not_null"
            )
    for name in table.checks:
        alter(f"RENAME CONSTRAINT {name} TO ck_{table.table}_{name.removesuffix('_json')}")
