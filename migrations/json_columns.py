"""Turn jsonb columns of `jobs` into json while the system runs.

ALTER COLUMN ... TYPE would rewrite the table under a lock that stops every statement. `prepare` adds json columns beside
the old ones, keeps them filled by a trigger, and fills the rows that exist in short transactions. What is left for the
migration's own transaction is `swap`: it drops and renames columns, which reads no rows. A run that was interrupted goes
on where it stopped.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

COLUMNS = ("body", "params", "result")
CHUNK = 1_000  # rows of one transaction
NAMED_NOT_NULL = (18,)  # the first PostgreSQL whose NOT NULL constraints have names
_SET = ", ".join(f"{name}_json = {name}::json" for name in COLUMNS)
_FILL = text(
    f"WITH chunk AS (SELECT id FROM jobs WHERE id > :after ORDER BY id LIMIT {CHUNK}), "
    f"filled AS (UPDATE jobs SET {_SET} FROM chunk WHERE jobs.id = chunk.id AND jobs.body_json IS NULL) "
    "SELECT max(id) FROM chunk"
)
_CHECKS = {
    "result_when_succeeded_json": "(status = 'succeeded' AND purged_at IS NULL) = (result_json IS NOT NULL)",
    "body_json_given": "body_json IS NOT NULL",
    "params_json_given": "params_json IS NOT NULL",
}
_TRIGGER = f"""
CREATE OR REPLACE FUNCTION vdiff_fill_json() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {" ".join(f"NEW.{name}_json := NEW.{name}::json;" for name in COLUMNS)}
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER jobs_fill_json BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION vdiff_fill_json();
"""


def prepare(connection: Connection) -> None:
    """Add the json columns and fill them; each statement is a transaction where the connection commits by itself."""
    added = ", ".join(f"ADD COLUMN IF NOT EXISTS {name}_json json" for name in COLUMNS)
    connection.execute(text(f"ALTER TABLE jobs {added}"))
    connection.execute(text(_TRIGGER))
    after: str | None = ""
    while after is not None:  # ids only grow, and rows that come later are filled by the trigger
        after = connection.execute(_FILL, {"after": after}).scalar_one()
    known = set(
        connection.execute(text("SELECT conname FROM pg_constraint WHERE conrelid = 'jobs'::regclass")).scalars()
    )
    for name, condition in _CHECKS.items():
        if name not in known:
            connection.execute(text(f"ALTER TABLE jobs ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID"))
        connection.execute(text(f"ALTER TABLE jobs VALIDATE CONSTRAINT {name}"))


def is_prepared(connection: Connection) -> bool:
    """Return whether `prepare` has run to its end."""
    last = list(_CHECKS)[-1]
    query = "SELECT convalidated FROM pg_constraint WHERE conrelid = 'jobs'::regclass AND conname = :name"
    return bool(connection.execute(text(query), {"name": last}).scalar_one_or_none())


def swap(connection: Connection) -> None:
    """Put the json columns in the place of the old ones. No row is read: validated checks stand for NOT NULL."""
    connection.execute(text("DROP TRIGGER jobs_fill_json ON jobs"))
    connection.execute(text("DROP FUNCTION vdiff_fill_json()"))
    connection.execute(
        text("ALTER TABLE jobs ALTER COLUMN body_json SET NOT NULL, ALTER COLUMN params_json SET NOT NULL")
    )
    connection.execute(text("ALTER TABLE jobs DROP CONSTRAINT body_json_given, DROP CONSTRAINT params_json_given"))
    connection.execute(text("ALTER TABLE jobs " + ", ".join(f"DROP COLUMN {name}" for name in COLUMNS)))
    for name in COLUMNS:
        connection.execute(text(f"ALTER TABLE jobs RENAME COLUMN {name}_json TO {name}"))
        if name != "result" and (connection.dialect.server_version_info or ()) >= NAMED_NOT_NULL:
            renamed = f"jobs_{name}_json_not_null TO jobs_{name}_not_null"
            connection.execute(text(f"ALTER TABLE jobs RENAME CONSTRAINT {renamed}"))
    connection.execute(
        text("ALTER TABLE jobs RENAME CONSTRAINT result_when_succeeded_json TO ck_jobs_result_when_succeeded")
    )
