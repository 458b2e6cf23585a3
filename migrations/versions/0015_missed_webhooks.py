"""what happens while an endpoint is disabled is kept, discarded, so that a redelivery brings it"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_WITH_MISSED = """
CREATE OR REPLACE FUNCTION vdiff_webhook_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kind text := 'job.' || CASE NEW.status WHEN 'running' THEN 'started' ELSE NEW.status END;
    own boolean := NEW.webhook IS NOT NULL AND NEW.webhook -> 'events' ? kind;
    event text;
BEGIN
    IF NOT own AND NOT EXISTS (
        SELECT 1 FROM webhook_endpoints e WHERE e.tenant = NEW.tenant AND kind = ANY (e.events)
            AND NEW.metadata @> e.metadata_filter
    ) THEN
        RETURN NULL;
    END IF;
    event := 'evt_' || replace(gen_random_uuid()::text, '-', '');
    INSERT INTO webhook_events (id, tenant, type, job_id, status, sequence)
        VALUES (event, NEW.tenant, kind, NEW.id, NEW.status, NEW.sequence);
    INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id, inline_result, status)
        SELECT event, NEW.tenant, e.id, e.inline_result, CASE WHEN e.enabled THEN 'pending' ELSE 'discarded' END
        FROM webhook_endpoints e
        WHERE e.tenant = NEW.tenant AND (
            (kind = ANY (e.events) AND NEW.metadata @> e.metadata_filter)
            OR (own AND NEW.webhook ->> 'endpoint_id' = e.id));
    IF own AND NEW.webhook ? 'url' THEN
        INSERT INTO webhook_deliveries (event_id, tenant, url, key_id, inline_result)
            VALUES (event, NEW.tenant, NEW.webhook ->> 'url', NEW.webhook ->> 'key_id',
                    coalesce((NEW.webhook ->> 'inline_result')::boolean, false));
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION vdiff_batch_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    kind text := 'batch.' || NEW.status;
    labels jsonb := coalesce(NEW.metadata, '{}'::jsonb);
    event text;
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM webhook_endpoints e WHERE e.tenant = NEW.tenant AND kind = ANY (e.events)
            AND labels @> e.metadata_filter
    ) THEN
        RETURN NULL;
    END IF;
    event := 'evt_' || replace(gen_random_uuid()::text, '-', '');
    INSERT INTO webhook_events (id, tenant, type, batch_id, status, sequence)
        VALUES (event, NEW.tenant, kind, NEW.id, NEW.status, NEW.sequence);
    INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id, status)
        SELECT event, NEW.tenant, e.id, CASE WHEN e.enabled THEN 'pending' ELSE 'discarded' END
        FROM webhook_endpoints e
        WHERE e.tenant = NEW.tenant AND kind = ANY (e.events) AND labels @> e.metadata_filter;
    RETURN NULL;
END $$;
"""

_BEFORE = """
CREATE OR REPLACE FUNCTION vdiff_webhook_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
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

CREATE OR REPLACE FUNCTION vdiff_batch_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
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
"""


def upgrade() -> None:
    op.execute(_WITH_MISSED)


def downgrade() -> None:
    op.execute(_BEFORE)
