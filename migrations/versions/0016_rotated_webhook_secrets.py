"""the former secrets of single jobs' webhooks, which sign for a while beside their successors"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, prefix in (
        ("api_keys", "previous_webhook_secret"),
        ("webhook_secrets", "previous_secret"),
    ):
        op.add_column(table, sa.Column(prefix, sa.Text(), nullable=True))
        op.add_column(
            table, sa.Column(f"{prefix}_until", sa.DateTime(timezone=True), nullable=True)
        )


def downgrade() -> None:
    for table, prefix in (
        ("api_keys", "previous_webhook_secret"),
        ("webhook_secrets", "previous_secret"),
    ):
        op.drop_column(table, f"{prefix}_until")
        op.drop_column(table, prefix)
