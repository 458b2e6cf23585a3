"""lanes: what is queued per model, priority and tenant, kept by triggers; whose turn it is"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_FUNCTIONS = """
CREATE FUNCTION vdiff_lanes_insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens)
        SELECT model, priority, tenant, count(*), sum(tokens::bigint) FROM added
        WHERE status = 'queued' GROUP BY model, priority, tenant;
    RETURN NULL;
END $$;

CREATE FUNCTION vdiff_lanes_move() RETURNS trigger LANGUAGE plpgsql AS $$
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
"""

_TRIGGERS = """
CREATE TRIGGER lanes_insert AFTER INSERT ON jobs REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION vdiff_lanes_insert();

CREATE TRIGGER lanes_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN ((OLD.status = 'queued' OR NEW.status = 'queued')
          AND (OLD.status, OLD.model, OLD.priority, OLD.tenant, OLD.tokens)
              IS DISTINCT FROM (NEW.status, NEW.model, NEW.priority, NEW.tenant, NEW.tokens))
    EXECUTE FUNCTION vdiff_lanes_move();

CREATE TRIGGER lanes_delete AFTER DELETE ON jobs FOR EACH ROW
    WHEN (OLD.status = 'queued') EXECUTE FUNCTION vdiff_lanes_move();
"""


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "deadline",
            sa.DateTime(timezone=True),
            sa.Computed("LEAST(start_by, complete_by)", persisted=True),
            nullable=True,
        ),
    )
    op.add_column("jobs", sa.Column("forecast_seconds", sa.Double(), nullable=True))
    op.drop_index("ix_jobs_queued", "jobs")
    op.create_index(
        "ix_jobs_lane",
        "jobs",
        ["model", "priority", "tenant", "deadline", "queued_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "ix_jobs_pushed",
        "jobs",
        ["model", "priority", "pushed_at"],
        unique=False,
        postgresql_where=sa.text("status = 'queued' AND pushed_at IS NOT NULL"),
    )
    op.create_table(
        "queues",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("clock", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("model", "priority", name=op.f("pk_queues")),
    )
    op.create_table(
        "lanes",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("jobs", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("clock", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("model", "priority", "tenant", name=op.f("pk_lanes")),
    )
    op.create_table(
        "lane_deltas",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lane_deltas")),
    )
    op.execute(_FUNCTIONS)
    op.execute(_TRIGGERS)
    op.execute(
        "INSERT INTO lane_deltas (model, priority, tenant, jobs, tokens) "
        "SELECT model, priority, tenant, count(*), sum(tokens::bigint) FROM jobs WHERE status = 'queued' "
        "GROUP BY model, priority, tenant"
    )
    # A queue's rows die young: collect them early, and read short tables often.
    op.execute(
        "ALTER TABLE jobs SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02)"
    )
    op.execute(
        "ALTER TABLE lane_deltas SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)"
    )


def downgrade() -> None:
    op.execute(
        "ALTER TABLE jobs RESET (autovacuum_vacuum_scale_factor, autovacuum_analyze_scale_factor)"
    )
    for name in ("lanes_delete", "lanes_update", "lanes_insert"):
        op.execute(f"DROP TRIGGER {name} ON jobs")
    op.execute("DROP FUNCTION vdiff_lanes_move()")
    op.execute("DROP FUNCTION vdiff_lanes_insert()")
    for table in ("lane_deltas", "lanes", "queues"):
        op.drop_table(table)
    op.drop_index("ix_jobs_pushed", "jobs")
    op.drop_index("ix_jobs_lane", "jobs")
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["model", "queued_at"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.drop_column("jobs", "forecast_seconds")
    op.drop_column("jobs", "deadline")
