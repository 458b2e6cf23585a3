"""json instead of jsonb where the order of keys and the digits of numbers have a meaning"""

from __future__ import annotations

from alembic import op

from migrations import json_columns

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

_SMALL = (  # one row for an evaluation or a configuration: rewriting them takes milliseconds
    ("evaluations", "template"),
    ("evaluations", "graders"),
    ("evaluation_runs", "fields"),
)


def upgrade() -> None:
    for table, column in _SMALL:  # before the lock on jobs: these are rewritten
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE json USING {column}::json")
    connection = op.get_bind()
    for converted in (json_columns.ITEMS, json_columns.JOBS):
        if not json_columns.is_prepared(
            connection, converted
        ):  # a new database; `migrations.run` prepares others
            json_columns.prepare(connection, converted)
        json_columns.swap(connection, converted)


def downgrade() -> None:
    for table, column in (*_SMALL, ("evaluation_items", "data")):
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE jsonb USING {column}::jsonb")
    op.execute(
        "ALTER TABLE jobs "
        + ", ".join(
            f"ALTER COLUMN {c} TYPE jsonb USING {c}::jsonb" for c in json_columns.JOBS.columns
        )
    )
