"""the dispatcher finds jobs that it may push by an index of their own"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.create_index(
        "ix_jobs_unpushed",
        "jobs",
        ["model", "priority", "tenant", "key_id", "deadline", "queued_at", "id"],
        postgresql_where=sa.text("status = 'queued' AND pushed_at IS NULL AND isolation IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_unpushed", table_name="jobs")
