"""Changes of large tables that do not block writers, for use in migrations.

A migration that uses these holds nothing else: each runs outside of a transaction, and a migration
that was interrupted runs again from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alembic import op
from sqlalchemy import Connection, text


@contextmanager
def _outside_transactions() -> Iterator[Connection]:
    """Run statements one by one, without timeouts: building an index of a large table takes minutes
    and blocks nobody.
    """
    with op.get_context().autocommit_block():
        connection = op.get_bind()
        before = {
            name: connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("statement_timeout", "lock_timeout")
        }
        for name in before:
            connection.execute(text(f"SET {name} = 0"))
        try:
            yield connection
        finally:
            for name, value in before.items():
                connection.execute(text(f"SET {name} = '{value}'"))


def create_index(name: str, table: str, columns: Sequence[str], **options: Any) -> None:
    """Create an index beside the table's writers; what an interrupted try left is replaced."""
    with _outside_transactions() as connection:
        valid = connection.execute(
            text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)"),
            {"name": name},
        ).scalar_one_or_none()
        if valid:
            return
        if valid is not None:
            op.drop_index(name, table_name=table, postgresql_concurrently=True)
        op.create_index(name, table, list(columns), postgresql_concurrently=True, **options)


def drop_index(name: str, table: str) -> None:
    """Drop an index beside the table's writers."""
    with _outside_transactions():
        op.drop_index(name, table_name=table, postgresql_concurrently=True, if_exists=True)
