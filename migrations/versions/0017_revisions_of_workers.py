"""which revision of its model a worker serves, so that a replay that nobody can run any more fails"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("revision", sa.Text(), nullable=True))
    op.create_index(
        "ix_jobs_pinned",
        "jobs",
        ["model", "pinned_revision"],
        unique=False,
        postgresql_where=sa.text(
            "status = 'queued' AND pinned_revision IS NOT NULL AND batch_id IS NULL"
        ),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_pinned", table_name="jobs")
    op.drop_column("workers", "revision")
