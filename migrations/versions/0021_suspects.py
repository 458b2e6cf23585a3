"""losses of workers are counted apart from failures of jobs; suspects run apart; leases have a
clock
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    zero = sa.text("0")
    op.add_column("jobs", sa.Column("losses", sa.Integer(), server_default=zero, nullable=False))
    op.add_column(
        "jobs", sa.Column("lost_alone", sa.Integer(), server_default=zero, nullable=False)
    )
    op.add_column("jobs", sa.Column("isolation", sa.Integer(), nullable=True))
    op.add_column(
        "attempts",
        sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.create_table(
        "lease_clock",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column(
            "at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column(
            "since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease_clock")),
    )
    # The next revision creates ix_jobs_isolation: this transaction holds ACCESS EXCLUSIVE on jobs.


def downgrade() -> None:
    op.drop_table("lease_clock")
    op.drop_column("attempts", "alone")
    for name in ("isolation", "lost_alone", "losses"):
        op.drop_column("jobs", name)
