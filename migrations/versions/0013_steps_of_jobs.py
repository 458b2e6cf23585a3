"""jobs keep how their answers came about; a job's webhook events are found by an index"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("steps", sa.LargeBinary(), nullable=True))
    op.create_index(
        "ix_webhook_events_job",
        "webhook_events",
        ["job_id"],
        unique=False,
        postgresql_where=sa.text("job_id IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_webhook_events_job", table_name="webhook_events")
    op.drop_column("jobs", "steps")
