"""Switch off inline results where a key that may not read results could have registered the
endpoint.

An endpoint does not know which key registered it. Only tenants that have a usable key with the
scope `webhooks` and without `jobs` are concerned: until now, such a key could have the results of
every job of its tenant sent to itself.
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        UPDATE webhook_endpoints e SET inline_result = false
        WHERE e.inline_result AND EXISTS (
            SELECT 1 FROM api_keys k
            WHERE k.tenant = e.tenant AND k.revoked_at IS NULL
                AND 'webhooks' = ANY (k.scopes) AND NOT k.scopes && ARRAY['jobs', 'admin'])
        """
    )


def downgrade() -> None:
    """Change nothing: which endpoints had inline results is not known any more."""
