"""Database rights of each process that has a role of its own.

    vdiff_api       everything that requests do; no DDL
    vdiff_worker    jobs and what counts them; no keys, secrets, files or texts of batches
    vdiff_deliver   webhooks; of jobs the result alone, of keys what signs

`deploy/postgresql/roles.sql` creates the roles; the role that migrates owns the tables. Each
migration grants anew, so a new table is never forgotten: a test compares this list with the tables.
Without these roles nothing is granted, and every process uses the owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import Connection, text

READ = "SELECT"
WRITE = "SELECT, INSERT, UPDATE, DELETE"
NONE = ""

_OUTBOX = "SELECT, INSERT, UPDATE, DELETE"
# What the triggers on `jobs` and `batches` look at, which run with the rights of whoever moves the
# job.
_MATCHES_ENDPOINTS = "SELECT (id, tenant, enabled, events, metadata_filter, inline_result)"

API: Mapping[str, str] = {
    "alembic_version": READ,
    "api_keys": "SELECT, INSERT, UPDATE",
    "attempts": WRITE,
    "batches": WRITE,
    "count_deltas": WRITE,
    "counts": WRITE,
    "evaluation_items": WRITE,
    "evaluation_runs": WRITE,
    "evaluation_samples": WRITE,
    "evaluations": WRITE,
    "file_chunks": WRITE,
    "files": WRITE,
    "jobs": WRITE,
    "lane_deltas": WRITE,
    "lanes": WRITE,
    "lease_clock": WRITE,
    "maintenance_counts": WRITE,
    "models": WRITE,
    "queues": WRITE,
    "senders": READ,
    "usage": WRITE,
    "usage_deltas": WRITE,
    "webhook_attempts": WRITE,
    "webhook_deliveries": _OUTBOX,
    "webhook_endpoints": WRITE,
    "webhook_events": _OUTBOX,
    "webhook_secrets": WRITE,
    "worker_failures": WRITE,
    "workers": WRITE,
}
WORKER: Mapping[str, str] = {
    "alembic_version": READ,
    "api_keys": "SELECT (id, weight)",
    "attempts": WRITE,
    "batches": "SELECT (id, status, expires_at)",
    "count_deltas": WRITE,
    "counts": WRITE,
    "evaluation_items": NONE,
    "evaluation_runs": "SELECT (id, status, evaluation_id)",
    "evaluation_samples": NONE,
    "evaluations": NONE,
    "file_chunks": NONE,
    "files": NONE,
    "jobs": WRITE,
    "lane_deltas": WRITE,
    "lanes": WRITE,
    "lease_clock": WRITE,
    "maintenance_counts": WRITE,
    "models": WRITE,
    "queues": WRITE,
    "senders": NONE,
    "usage": WRITE,
    "usage_deltas": WRITE,
    "webhook_attempts": NONE,
    "webhook_deliveries": "INSERT",
    "webhook_endpoints": _MATCHES_ENDPOINTS,
    "webhook_events": "INSERT",
    "webhook_secrets": NONE,
    "worker_failures": WRITE,
    "workers": WRITE,
}
DELIVER: Mapping[str, str] = {
    "alembic_version": READ,
    "api_keys": "SELECT (id, webhook_secret, previous_webhook_secret, previous_webhook_secret_until)",
    "attempts": NONE,
    "batches": NONE,
    "count_deltas": NONE,
    "counts": NONE,
    "evaluation_items": NONE,
    "evaluation_runs": NONE,
    "evaluation_samples": NONE,
    "evaluations": NONE,
    "file_chunks": NONE,
    "files": NONE,
    "jobs": "SELECT (id, status, result, traceparent)",
    "lane_deltas": NONE,
    "lanes": NONE,
    "lease_clock": NONE,
    "maintenance_counts": WRITE,  # the row that `vdiff health` writes
    "models": NONE,
    "queues": NONE,
    "senders": WRITE,
    "usage": NONE,
    "usage_deltas": NONE,
    "webhook_attempts": "SELECT, INSERT, DELETE",
    "webhook_deliveries": "SELECT, UPDATE, DELETE",
    "webhook_endpoints": "SELECT, UPDATE (enabled, disabled_reason, last_success_at)",
    "webhook_events": "SELECT, DELETE",
    "webhook_secrets": READ,
    "worker_failures": NONE,
    "workers": NONE,
}
ROLES: Mapping[str, Mapping[str, str]] = {
    "vdiff_api": API,
    "vdiff_worker": WORKER,
    "vdiff_deliver": DELIVER,
}


def statements(role: str, granted: Mapping[str, str]) -> Iterator[str]:
    """Yield the statements that give a role exactly these privileges."""
    yield f"GRANT USAGE ON SCHEMA public TO {role}"
    for table, privileges in sorted(granted.items()):
        yield f"REVOKE ALL ON {table} FROM {role}"
        if privileges:
            yield f"GRANT {privileges} ON {table} TO {role}"


def grant(connection: Connection) -> None:
    """Grant to the roles that exist what their processes need, in the migrator's transaction."""
    found = set(
        connection.execute(
            text("SELECT rolname FROM pg_roles WHERE rolname LIKE 'vdiff\\_%'")
        ).scalars()
    )
    tables = set(
        connection.execute(
            text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        ).scalars()
    )
    for role, granted in ROLES.items():
        if role in found:
            for statement in statements(
                role, {name: what for name, what in granted.items() if name in tables}
            ):
                connection.execute(text(statement))
