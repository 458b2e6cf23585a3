"""jobs know their key: lanes, weights and limits per key; usage per key, model and day, kept by a
trigger
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_COUNTS = (
    "succeeded",
    "failed",
    "cancelled",
    "expired",
    "attempts",
    "prompt_tokens",
    "completion_tokens",
    "forwards",
)

_LANES = """
CREATE OR REPLACE FUNCTION vdiff_lanes_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lane_deltas (model, priority, tenant, key_id, jobs, tokens)
        SELECT model, priority, tenant, key_id, count(*), sum(tokens::bigint) FROM added
        WHERE status = 'queued' GROUP BY model, priority, tenant, key_id;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION vdiff_lanes_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.status = 'queued' THEN
        INSERT INTO lane_deltas (model, priority, tenant, key_id, jobs, tokens)
            VALUES (OLD.model, OLD.priority, OLD.tenant, OLD.key_id, -1, -OLD.tokens::bigint);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.status = 'queued' THEN
        INSERT INTO lane_deltas (model, priority, tenant, key_id, jobs, tokens)
            VALUES (NEW.model, NEW.priority, NEW.tenant, NEW.key_id, 1, NEW.tokens);
    END IF;
    RETURN NULL;
END $$;

DROP TRIGGER lanes_update ON jobs;
CREATE TRIGGER lanes_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN ((OLD.status = 'queued' OR NEW.status = 'queued')
          AND (OLD.status, OLD.model, OLD.priority, OLD.tenant, OLD.key_id, OLD.tokens)
              IS DISTINCT FROM (NEW.status, NEW.model, NEW.priority, NEW.tenant, NEW.key_id, NEW.tokens))
    EXECUTE FUNCTION vdiff_lanes_move();
"""

_LANES_BEFORE = """
CREATE OR REPLACE FUNCTION vdiff_lanes_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens)
        SELECT model, priority, tenant, count(*), sum(tokens::bigint) FROM added
        WHERE status = 'queued' GROUP BY model, priority, tenant;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION vdiff_lanes_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.status = 'queued' THEN
        INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens)
            VALUES (OLD.model, OLD.priority, OLD.tenant, -1, -OLD.tokens::bigint);
    END IF;
    IF TG_OP = 'UPDATE' AND NEW.status = 'queued' THEN
        INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens)
            VALUES (NEW.model, NEW.priority, NEW.tenant, 1, NEW.tokens);
    END IF;
    RETURN NULL;
END $$;

DROP TRIGGER lanes_update ON jobs;
CREATE TRIGGER lanes_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN ((OLD.status = 'queued' OR NEW.status = 'queued')
          AND (OLD.status, OLD.model, OLD.priority, OLD.tenant, OLD.tokens)
              IS DISTINCT FROM (NEW.status, NEW.model, NEW.priority, NEW.tenant, NEW.tokens))
    EXECUTE FUNCTION vdiff_lanes_move();
"""

# An attempt that ended (running -> anything) and a job that ended, in the transaction that ends
# them. A retry is another life: its usage adds to that of the lives before.
_USAGE = """
CREATE FUNCTION vdiff_usage() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    over boolean := NEW.status NOT IN ('queued', 'running');
    ran boolean := OLD.status = 'running';
BEGIN
    INSERT INTO usage_deltas (day, tenant, key_id, model, succeeded, failed, cancelled, expired, attempts,
                              prompt_tokens, completion_tokens, forwards, run_seconds, device_seconds)
    VALUES (
        (now() AT TIME ZONE 'UTC')::date, NEW.tenant, NEW.key_id, NEW.model,
        (NEW.status = 'succeeded')::int, (NEW.status = 'failed')::int, (NEW.status = 'cancelled')::int,
        (NEW.status = 'expired')::int, ran::int,
        CASE WHEN over THEN coalesce((NEW.usage ->> 'prompt_tokens')::bigint, 0) ELSE 0 END,
        CASE WHEN over THEN coalesce((NEW.usage ->> 'completion_tokens')::bigint, 0) ELSE 0 END,
        CASE WHEN over THEN coalesce((NEW.diffusion ->> 'forwards')::bigint, 0) ELSE 0 END,
        CASE WHEN ran THEN greatest(0, extract(epoch FROM now() - OLD.started_at)) ELSE 0 END,
        CASE WHEN over THEN coalesce((NEW.timing ->> 'device_ms')::double precision, 0) / 1000 ELSE 0 END);
    RETURN NULL;
END $$;

CREATE TRIGGER jobs_usage AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status
          AND (OLD.status = 'running' OR NEW.status NOT IN ('queued', 'running')))
    EXECUTE FUNCTION vdiff_usage();
"""


def _of() -> list[sa.Column[Any]]:
    return [
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
    ]


def _amounts() -> list[sa.Column[Any]]:
    return [
        *(
            sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)
            for name in _COUNTS
        ),
        sa.Column("run_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
    ]


def _lane_index(*columns: str) -> None:
    op.drop_index("ix_jobs_lane", "jobs")
    op.create_index(
        "ix_jobs_lane",
        "jobs",
        ["model", "priority", *columns, "deadline", "queued_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )


def upgrade() -> None:
    for table in ("jobs", "batches", "lanes", "lane_deltas"):
        op.add_column(
            table, sa.Column("key_id", sa.Text(), server_default=sa.text("''"), nullable=False)
        )
    _lane_index("tenant", "key_id")
    op.drop_constraint("pk_lanes", "lanes")
    op.create_primary_key("pk_lanes", "lanes", ["model", "priority", "tenant", "key_id"])
    op.execute(_LANES)
    op.create_table(
        "usage",
        *_of(),
        *_amounts(),
        sa.PrimaryKeyConstraint("tenant", "day", "key_id", "model", name=op.f("pk_usage")),
    )
    op.create_table(
        "usage_deltas",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        *_of(),
        *_amounts(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_deltas")),
    )
    op.execute(
        "ALTER TABLE usage_deltas SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)"
    )
    op.execute(_USAGE)


def downgrade() -> None:
    op.execute("DROP TRIGGER jobs_usage ON jobs")
    op.execute("DROP FUNCTION vdiff_usage()")
    op.drop_table("usage_deltas")
    op.drop_table("usage")
    op.execute(_LANES_BEFORE)
    # Lanes of several keys become their tenant's one: counted anew.
    op.execute("DELETE FROM lane_deltas")
    op.execute("DELETE FROM lanes")
    op.drop_constraint("pk_lanes", "lanes")
    op.create_primary_key("pk_lanes", "lanes", ["model", "priority", "tenant"])
    _lane_index("tenant")
    for table in ("lane_deltas", "lanes", "batches", "jobs"):
        op.drop_column(table, "key_id")
    op.execute(
        "INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens) "
        "SELECT model, priority, tenant, count(*), sum(tokens::bigint) FROM jobs WHERE status = 'queued' "
        "GROUP BY model, priority, tenant"
    )
