"""deadlines, lives, replays, purge"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NEW_COLUMNS: tuple[sa.Column[Any], ...] = (
    sa.Column("life", sa.Integer(), server_default=sa.text("1"), nullable=False),
    sa.Column("start_by", sa.DateTime(timezone=True), nullable=True),
    sa.Column("complete_by", sa.DateTime(timezone=True), nullable=True),
    sa.Column("max_run_seconds", sa.Double(), nullable=True),
    sa.Column("retain_seconds", sa.Double(), nullable=True),
    sa.Column("purge_after", sa.DateTime(timezone=True), nullable=True),
    sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True),
    sa.Column("revision", sa.Text(), nullable=True),
    sa.Column("pinned_revision", sa.Text(), nullable=True),
    sa.Column("replay_of", sa.Text(), nullable=True),
)


def upgrade() -> None:
    for column in _NEW_COLUMNS:
        op.add_column("jobs", column._copy())
    op.add_column(
        "attempts", sa.Column("life", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.drop_constraint(op.f("ck_jobs_result_when_succeeded"), "jobs", type_="check")
    op.create_check_constraint(
        op.f("ck_jobs_result_when_succeeded"),
        "jobs",
        "(status = 'succeeded' AND purged_at IS NULL) = (result IS NOT NULL)",
    )
    op.create_check_constraint(
        op.f("ck_jobs_purged_when_done"), "jobs", "purged_at IS NULL OR finished_at IS NOT NULL"
    )
    op.create_index(
        "ix_jobs_start_by",
        "jobs",
        ["start_by"],
        unique=False,
        postgresql_where=sa.text("status = 'queued' AND start_by IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_complete_by",
        "jobs",
        ["complete_by"],
        unique=False,
        postgresql_where=sa.text("status IN ('queued', 'running') AND complete_by IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_purge_after",
        "jobs",
        ["purge_after"],
        unique=False,
        postgresql_where=sa.text("purge_after IS NOT NULL AND purged_at IS NULL"),
    )
    op.create_index(
        "ix_jobs_finished_at",
        "jobs",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )


def downgrade() -> None:
    for name in (
        "ix_jobs_finished_at",
        "ix_jobs_purge_after",
        "ix_jobs_complete_by",
        "ix_jobs_start_by",
    ):
        op.drop_index(name, "jobs")
    op.drop_constraint(op.f("ck_jobs_purged_when_done"), "jobs", type_="check")
    op.drop_constraint(op.f("ck_jobs_result_when_succeeded"), "jobs", type_="check")
    op.execute(
        "DELETE FROM jobs WHERE purged_at IS NOT NULL"
    )  # the former schema has no place for them
    op.create_check_constraint(
        op.f("ck_jobs_result_when_succeeded"),
        "jobs",
        "(status = 'succeeded') = (result IS NOT NULL)",
    )
    op.drop_column("attempts", "life")
    for column in reversed(_NEW_COLUMNS):
        op.drop_column("jobs", column.name)
