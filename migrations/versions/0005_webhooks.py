"""webhooks: endpoints, an outbox written by a trigger, deliveries, attempts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TABLES = (
    "webhook_attempts",
    "webhook_deliveries",
    "webhook_events",
    "webhook_secrets",
    "webhook_endpoints",
)

_FUNCTIONS = """
CREATE FUNCTION vdiff_count_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.sequence := OLD.sequence + 1;
    RETURN NEW;
END $$;

-- The outbox: an event and a row for each receiver, in the transaction that moves the job.
CREATE FUNCTION vdiff_webhook_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kind text := 'job.' || CASE NEW.status WHEN 'running' THEN 'started' ELSE NEW.status END;
    own boolean := NEW.webhook IS NOT NULL AND NEW.webhook -> 'events' ? kind;
    event text;
BEGIN
    IF NOT own AND NOT EXISTS (
        SELECT 1 FROM webhook_endpoints e WHERE e.tenant = NEW.tenant AND e.enabled AND kind = ANY (e.events)
            AND NEW.metadata @> e.metadata_filter
    ) THEN
        RETURN NULL;
    END IF;
    event := 'evt_' || replace(gen_random_uuid()::text, '-', '');
    INSERT INTO webhook_events (id, tenant, type, job_id, status, sequence)
        VALUES (event, NEW.tenant, kind, NEW.id, NEW.status, NEW.sequence);
    INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id, inline_result)
        SELECT event, NEW.tenant, e.id, e.inline_result FROM webhook_endpoints e
        WHERE e.tenant = NEW.tenant AND e.enabled AND (
            (kind = ANY (e.events) AND NEW.metadata @> e.metadata_filter)
            OR (own AND NEW.webhook ->> 'endpoint_id' = e.id));
    IF own AND NEW.webhook ? 'url' THEN
        INSERT INTO webhook_deliveries (event_id, tenant, url, key_id, inline_result)
            VALUES (event, NEW.tenant, NEW.webhook ->> 'url', NEW.webhook ->> 'key_id',
                    coalesce((NEW.webhook ->> 'inline_result')::boolean, false));
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER jobs_count_moves BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION vdiff_count_moves();
CREATE TRIGGER webhook_outbox_insert AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION vdiff_webhook_outbox();
CREATE TRIGGER webhook_outbox_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION vdiff_webhook_outbox();
"""


def _moment(name: str, *, default: bool = False) -> sa.Column[object]:
    if default:
        return sa.Column(
            name, sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        )
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def _boolean(name: str, default: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), server_default=sa.text(default), nullable=False)


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("sequence", sa.Integer(), server_default=sa.text("1"), nullable=False)
    )
    op.add_column(
        "jobs", sa.Column("webhook", postgresql.JSONB(astext_type=sa.Text()), nullable=True)
    )
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("events", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column(
            "metadata_filter",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        _boolean("inline_result", "false"),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("previous_secret", sa.Text(), nullable=True),
        _moment("previous_until"),
        _boolean("enabled", "true"),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        _moment("last_success_at"),
        _moment("created_at", default=True),
        sa.CheckConstraint(
            "(previous_secret IS NULL) = (previous_until IS NULL)",
            name=op.f("ck_webhook_endpoints_previous_has_an_end"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
    )
    op.create_index(
        "ix_webhook_endpoints_tenant", "webhook_endpoints", ["tenant", "id"], unique=False
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_webhook_secrets")),
    )
    op.create_table(
        "webhook_events",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=True),
        sa.Column("sequence", sa.Integer(), nullable=False),
        _moment("created_at", default=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_events")),
    )
    op.create_index("ix_webhook_events_created_at", "webhook_events", ["created_at"], unique=False)
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.Text(), nullable=True),
        sa.Column("url", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True),
        _boolean("inline_result", "false"),
        sa.Column("status", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        _moment("next_attempt_at", default=True),
        _moment("lease_until"),
        _moment("created_at", default=True),
        _moment("delivered_at"),
        sa.CheckConstraint(
            "status IN ('pending', 'delivered', 'failed', 'discarded')",
            name=op.f("ck_webhook_deliveries_status"),
        ),
        sa.CheckConstraint(
            "(endpoint_id IS NULL) <> (url IS NULL)",
            name=op.f("ck_webhook_deliveries_one_receiver"),
        ),
        sa.ForeignKeyConstraint(
            ["event_id"],
            ["webhook_events.id"],
            name=op.f("fk_webhook_deliveries_event_id_webhook_events"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name=op.f("fk_webhook_deliveries_endpoint_id_webhook_endpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_attempt_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", "id"], unique=False
    )
    op.create_index("ix_webhook_deliveries_event", "webhook_deliveries", ["event_id"], unique=False)
    op.create_table(
        "webhook_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("delivery_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("duration_ms", sa.Double(), nullable=False),
        _moment("created_at", default=True),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            name=op.f("fk_webhook_attempts_delivery_id_webhook_deliveries"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_attempts")),
    )
    op.create_index(
        "ix_webhook_attempts_delivery", "webhook_attempts", ["delivery_id", "id"], unique=False
    )
    op.execute(_FUNCTIONS)


def downgrade() -> None:
    for name in ("webhook_outbox_update", "webhook_outbox_insert", "jobs_count_moves"):
        op.execute(f"DROP TRIGGER {name} ON jobs")
    op.execute("DROP FUNCTION vdiff_webhook_outbox()")
    op.execute("DROP FUNCTION vdiff_count_moves()")
    for table in _TABLES:
        op.drop_table(table)
    op.drop_column("jobs", "webhook")
    op.drop_column("jobs", "sequence")
