"""Statements that only `vdiff doctor` runs on PostgreSQL. `vdiff.doctor` interprets the answers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, extract, func, select, text

from shared.webhooks.repository import ATTEMPTS, DELIVERIES, ENDPOINTS

SHOWN_RECEIVERS = 20
_A, _D, _E = ATTEMPTS.c, DELIVERIES.c, ENDPOINTS.c


def server() -> Select[Any]:
    """(version, seconds, bytes, connections, max_connections): `seconds` is the server's clock,
    Unix time.
    """
    return select(
        func.current_setting("server_version").label("version"),
        extract("epoch", func.clock_timestamp()).label("seconds"),
        func.pg_database_size(func.current_database()).label("bytes"),
        select(func.count())
        .select_from(text("pg_stat_activity"))
        .scalar_subquery()
        .label("connections"),
        func.current_setting("max_connections").label("max_connections"),
    )


def webhook_backlog() -> Select[int, int, int]:
    """(due, overdue_seconds, failing): deliveries whose time has come, since when, and how many
    wait to be tried again.
    """
    due = (_D.next_attempt_at <= func.now()) & (
        _D.lease_until.is_(None) | (_D.lease_until <= func.now())
    )
    return select(
        func.count().filter(due).label("due"),
        extract("epoch", func.now() - func.min(_D.next_attempt_at).filter(due)).label(
            "overdue_seconds"
        ),
        func.count().filter(_D.attempts > 0).label("failing"),
    ).where(_D.status == "pending")


def refusing_receivers() -> Select[Any]:
    """(endpoint_id, url, waiting, status_code, error): who did not take what waits to be tried
    again, and a reason of the last attempts; those with the most first. `endpoint_id` is null for a
    URL that jobs named themselves.
    """
    waiting = func.count(_D.id.distinct())
    return (
        select(
            _D.endpoint_id,
            func.coalesce(_E.url, _D.url).label("url"),
            waiting.label("waiting"),
            func.max(_A.status_code).label("status_code"),
            func.max(_A.error).label("error"),
        )
        .select_from(DELIVERIES)
        .outerjoin(ENDPOINTS, _E.id == _D.endpoint_id)
        .outerjoin(ATTEMPTS, (_A.delivery_id == _D.id) & (_A.attempt == _D.attempts))
        .where(_D.status == "pending", _D.attempts > 0)
        .group_by(_D.endpoint_id, func.coalesce(_E.url, _D.url))
        .order_by(waiting.desc())
        .limit(SHOWN_RECEIVERS)
    )


def disabled_endpoints() -> Select[Any]:
    """(id, url, disabled_reason) of those that were disabled because they did not answer."""
    return (
        select(_E.id, _E.url, _E.disabled_reason)
        .where(_E.enabled.is_(False), _E.disabled_reason.is_not(None))
        .order_by(_E.id)
        .limit(SHOWN_RECEIVERS)
    )
