"""json instead of jsonb where the order of keys and the digits of numbers have a meaning"""

from __future__ import annotations

from alembic import op

from migrations import json_columns

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

_SMALL = (
    ("evaluations", "template"),
    ("evaluations", "graders"),
    ("evaluation_runs", "fields"),
    ("evaluation_items", "data"),
)


def upgrade() -> None:
    for table, column in _SMALL:  # before the lock on jobs: these are rewritten
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE json USING {column}::json")
    connection = op.get_bind()
    if not json_columns.is_prepared(connection):  # a new database; `migrations.run` has prepared one that holds jobs
        json_columns.prepare(connection)
    json_columns.swap(connection)


def downgrade() -> None:
    for table, column in _SMALL:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} TYPE jsonb USING {column}::jsonb")
    op.execute(
        "ALTER TABLE jobs " + ", ".join(f"ALTER COLUMN {c} TYPE jsonb USING {c}::jsonb" for c in json_columns.COLUMNS)
    )
