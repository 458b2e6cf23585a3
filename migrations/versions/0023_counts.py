"""how many jobs, batches, evaluations and files there are is counted as it changes, not when
somebody asks
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

# Of jobs only ends are counted: what is queued is in `lanes`, what runs is in a short index.
_FUNCTIONS = """
CREATE FUNCTION vdiff_count_jobs_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO count_deltas (kind, tenant, status, amount)
        SELECT 'job', tenant, status, count(*) FROM added
        WHERE status NOT IN ('queued', 'running') GROUP BY tenant, status;
    RETURN NULL;
END $$;

CREATE FUNCTION vdiff_count_jobs_gone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO count_deltas (kind, tenant, status, amount)
        SELECT 'job', tenant, status, -count(*) FROM gone
        WHERE status NOT IN ('queued', 'running') GROUP BY tenant, status;
    RETURN NULL;
END $$;

CREATE FUNCTION vdiff_count_jobs_moved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.status NOT IN ('queued', 'running') THEN
        INSERT INTO count_deltas (kind, tenant, status, amount) VALUES ('job', OLD.tenant, OLD.status, -1);
    END IF;
    IF NEW.status NOT IN ('queued', 'running') THEN
        INSERT INTO count_deltas (kind, tenant, status, amount) VALUES ('job', NEW.tenant, NEW.status, 1);
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION vdiff_count_rows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO count_deltas (kind, tenant, status, amount) VALUES (TG_ARGV[0], OLD.tenant, OLD.status, -1);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO count_deltas (kind, tenant, status, amount) VALUES (TG_ARGV[0], NEW.tenant, NEW.status, 1);
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION vdiff_count_files() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.status = 'ready' THEN
        INSERT INTO count_deltas (kind, tenant, status, amount, bytes)
            VALUES ('file', OLD.tenant, OLD.purpose, -1, -OLD.bytes);
    END IF;
    IF TG_OP <> 'DELETE' AND NEW.status = 'ready' THEN
        INSERT INTO count_deltas (kind, tenant, status, amount, bytes)
            VALUES ('file', NEW.tenant, NEW.purpose, 1, NEW.bytes);
    END IF;
    RETURN NULL;
END $$;
"""

_TRIGGERS = """
CREATE TRIGGER jobs_count_insert AFTER INSERT ON jobs REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION vdiff_count_jobs_added();
CREATE TRIGGER jobs_count_delete AFTER DELETE ON jobs REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION vdiff_count_jobs_gone();
CREATE TRIGGER jobs_count_update AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status
          AND (OLD.status NOT IN ('queued', 'running') OR NEW.status NOT IN ('queued', 'running')))
    EXECUTE FUNCTION vdiff_count_jobs_moved();
"""


def _of_rows(table: str, kind: str) -> str:
    return f"""
CREATE TRIGGER {table}_count AFTER INSERT OR DELETE ON {table} FOR EACH ROW
    EXECUTE FUNCTION vdiff_count_rows('{kind}');
CREATE TRIGGER {table}_count_update AFTER UPDATE ON {table} FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION vdiff_count_rows('{kind}');
"""


_OF_FILES = """
CREATE TRIGGER files_count AFTER INSERT OR DELETE ON files FOR EACH ROW EXECUTE FUNCTION vdiff_count_files();
CREATE TRIGGER files_count_update AFTER UPDATE ON files FOR EACH ROW
    WHEN ((OLD.status, OLD.purpose, OLD.bytes) IS DISTINCT FROM (NEW.status, NEW.purpose, NEW.bytes))
    EXECUTE FUNCTION vdiff_count_files();
"""


def _columns() -> list[sa.Column[object]]:
    return [
        sa.Column("amount", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
    ]


def upgrade() -> None:
    names = ("kind", "tenant", "status")
    op.create_table(
        "counts",
        *(sa.Column(name, sa.Text(), nullable=False) for name in names),
        *_columns(),
        sa.PrimaryKeyConstraint(*names, name=op.f("pk_counts")),
    )
    op.create_table(
        "count_deltas",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in names),
        *_columns(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_count_deltas")),
    )
    op.execute(
        "ALTER TABLE count_deltas SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)"
    )
    op.execute(_FUNCTIONS)
    op.execute(_TRIGGERS)
    op.execute(_of_rows("batches", "batch"))
    op.execute(_of_rows("evaluations", "evaluation"))
    op.execute(_OF_FILES)


def downgrade() -> None:
    for name in ("jobs_count_insert", "jobs_count_delete", "jobs_count_update"):
        op.execute(f"DROP TRIGGER {name} ON jobs")
    for table in ("batches", "evaluations", "files"):
        op.execute(f"DROP TRIGGER {table}_count ON {table}")
        op.execute(f"DROP TRIGGER {table}_count_update ON {table}")
    for name in ("jobs_added", "jobs_gone", "jobs_moved", "rows", "files"):
        op.execute(f"DROP FUNCTION vdiff_count_{name}()")
    op.drop_table("count_deltas")
    op.drop_table("counts")
