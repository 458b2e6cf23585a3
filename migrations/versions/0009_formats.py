"""jobs say in which format their row is; freed idempotency keys are found by an index"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("format", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.create_index(
        "ix_jobs_idempotency_created",
        "jobs",
        ["created_at"],
        unique=False,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_idempotency_created", "jobs")
    op.drop_column("jobs", "format")
