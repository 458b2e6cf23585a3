"""Alembic's environment: runs on the connection that `migrations.run` hands over, with its lock and
timeouts set.
"""

from __future__ import annotations

from alembic import context

import shared.db.tables  # noqa: F401  (importing it fills the metadata)
from shared.db.base import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
    compare_server_default=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
