"""every filter of a list has an index in the list's order"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.create_index(
        "ix_jobs_isolation",
        "jobs",
        ["model", "queued_at"],
        postgresql_where=sa.text("status = 'queued' AND isolation IS NOT NULL"),
    )
    # (tenant, model, status, id) serves model alone too: a list of one model merges the states'
    # newest.
    online.create_index(
        "ix_jobs_tenant_model_status_id", "jobs", ["tenant", "model", "status", "id"]
    )
    online.create_index(
        "ix_jobs_batch_id",
        "jobs",
        ["batch_id", "id"],
        postgresql_where=sa.text("batch_id IS NOT NULL"),
    )
    online.create_index(
        "ix_webhook_deliveries_tenant", "webhook_deliveries", ["tenant", "status", "id"]
    )
    online.create_index(
        "ix_webhook_deliveries_endpoint_status",
        "webhook_deliveries",
        ["endpoint_id", "status", "id"],
    )
    online.create_index(
        "ix_webhook_deliveries_turns",
        "webhook_deliveries",
        ["tenant", "next_attempt_at"],
        postgresql_where=sa.text("status = 'pending'"),
    )
    online.create_index(
        "ix_webhook_deliveries_leased",
        "webhook_deliveries",
        ["lease_until"],
        postgresql_where=sa.text("status = 'pending' AND lease_until IS NOT NULL"),
    )
    online.create_index("ix_files_tenant_purpose", "files", ["tenant", "purpose", "id"])
    online.create_index("ix_usage_day", "usage", ["day"])
    online.drop_index("ix_webhook_deliveries_endpoint", "webhook_deliveries")


def downgrade() -> None:
    op.create_index("ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", "id"])
    for name, table in (
        ("ix_usage_day", "usage"),
        ("ix_files_tenant_purpose", "files"),
        ("ix_webhook_deliveries_leased", "webhook_deliveries"),
        ("ix_webhook_deliveries_turns", "webhook_deliveries"),
        ("ix_webhook_deliveries_endpoint_status", "webhook_deliveries"),
        ("ix_webhook_deliveries_tenant", "webhook_deliveries"),
        ("ix_jobs_batch_id", "jobs"),
        ("ix_jobs_tenant_model_status_id", "jobs"),
        ("ix_jobs_isolation", "jobs"),
    ):
        op.drop_index(name, table_name=table)
