"""webhook events of batches: an outbox written by a trigger, as that of jobs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_FUNCTIONS = """
-- The outbox of batches: an event and a row for each receiver, in the transaction that ends the batch.
CREATE FUNCTION vdiff_batch_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kind text := 'batch.' || NEW.status;
    labels jsonb := coalesce(NEW.metadata, '{}'::jsonb);
    event text;
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM webhook_endpoints e WHERE e.tenant = NEW.tenant AND e.enabled AND kind = ANY (e.events)
            AND labels @> e.metadata_filter
    ) THEN
        RETURN NULL;
    END IF;
    event := 'evt_' || replace(gen_random_uuid()::text, '-', '');
    INSERT INTO webhook_events (id, tenant, type, batch_id, status, sequence)
        VALUES (event, NEW.tenant, kind, NEW.id, NEW.status, NEW.sequence);
    INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id)
        SELECT event, NEW.tenant, e.id FROM webhook_endpoints e
        WHERE e.tenant = NEW.tenant AND e.enabled AND kind = ANY (e.events) AND labels @> e.metadata_filter;
    RETURN NULL;
END $$;

CREATE TRIGGER batches_count_moves BEFORE UPDATE ON batches FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION vdiff_count_moves();
CREATE TRIGGER webhook_outbox_update AFTER UPDATE ON batches FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status AND NEW.status IN ('completed', 'failed', 'cancelled', 'expired'))
    EXECUTE FUNCTION vdiff_batch_outbox();
"""


def upgrade() -> None:
    op.add_column("webhook_events", sa.Column("batch_id", sa.Text(), nullable=True))
    op.add_column(
        "batches", sa.Column("sequence", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.execute(_FUNCTIONS)


def downgrade() -> None:
    for name in ("webhook_outbox_update", "batches_count_moves"):
        op.execute(f"DROP TRIGGER {name} ON batches")
    op.execute("DROP FUNCTION vdiff_batch_outbox()")
    op.drop_column("batches", "sequence")
    op.drop_column("webhook_events", "batch_id")
