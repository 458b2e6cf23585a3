"""count what was there before counts were kept

The triggers of the revision before are at work already, so the table of jobs is not locked: one
statement sees one moment, and what the triggers had counted until then is taken off what is there.
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_FILL = """
INSERT INTO count_deltas (kind, tenant, status, amount, bytes)
SELECT kind, tenant, status, sum(amount), sum(bytes) FROM (
    SELECT 'job' AS kind, tenant, status, count(*) AS amount, 0 AS bytes FROM jobs
        WHERE status NOT IN ('queued', 'running') GROUP BY tenant, status
    UNION ALL SELECT 'batch', tenant, status, count(*), 0 FROM batches GROUP BY tenant, status
    UNION ALL SELECT 'evaluation', tenant, status, count(*), 0 FROM evaluations GROUP BY tenant, status
    UNION ALL SELECT 'file', tenant, purpose, count(*), sum(bytes) FROM files WHERE status = 'ready'
        GROUP BY tenant, purpose
    UNION ALL SELECT kind, tenant, status, -amount, -bytes FROM counts
    UNION ALL SELECT kind, tenant, status, -amount, -bytes FROM count_deltas
) AS found GROUP BY kind, tenant, status HAVING sum(amount) <> 0 OR sum(bytes) <> 0
"""


def upgrade() -> None:
    op.execute(_FILL)


def downgrade() -> None:
    """Counts stay as they are; the revision before drops them."""
