"""All SQL of webhooks: endpoints for the API, outbox and attempts for `worker.delivery`. For both
kinds of session.

The event rows themselves are written by a trigger on `jobs` (migration 0005).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    CTE,
    ColumnElement,
    Delete,
    Executable,
    Insert,
    Select,
    Table,
    Update,
    case,
    delete,
    exists,
    func,
    lateral,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from shared.db.expressions import seconds
from shared.db.tables import (
    ApiKey,
    Job,
    WebhookAttempt,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEvent,
    WebhookSecret,
)
from shared.db.tables.webhooks import DELIVERY_STATES
from shared.metrics import DisabledReason

ENDPOINTS = cast(Table, WebhookEndpoint.__table__)
EVENTS = cast(Table, WebhookEvent.__table__)
DELIVERIES = cast(Table, WebhookDelivery.__table__)
ATTEMPTS = cast(Table, WebhookAttempt.__table__)
SECRETS = cast(Table, WebhookSecret.__table__)
_E, _V, _D, _A, _S = ENDPOINTS.c, EVENTS.c, DELIVERIES.c, ATTEMPTS.c, SECRETS.c
_J, _K = cast(Table, Job.__table__).c, cast(Table, ApiKey.__table__).c
ATTEMPTS_SHOWN = 20  # of a delivery, in lists
FORGET_BATCH = 500  # events that go at a time
MAX_ID = (1 << 63) - 1
TENANTS_MAX = 10_000  # whose deliveries one look considers
REMOVE_CHUNK = 2_000  # deliveries that one transaction removes, with their attempts


# Endpoints


def create_endpoint(values: Mapping[str, Any]) -> Insert:
    return insert(ENDPOINTS).values(**values)


def get_endpoint(endpoint_id: str, tenant: str) -> Select[Any]:
    return select(ENDPOINTS).where(
        _E.id == endpoint_id, _E.tenant == tenant, _E.deleted_at.is_(None)
    )


def list_endpoints(tenant: str, *, after: str | None, limit: int) -> Select[Any]:
    found = select(ENDPOINTS).where(_E.tenant == tenant, _E.deleted_at.is_(None))
    if after is not None:
        found = found.where(_E.id > after)
    return found.order_by(_E.id).limit(limit + 1)


def count_endpoints(tenant: str) -> Select[Any]:
    return (
        select(func.count())
        .select_from(ENDPOINTS)
        .where(_E.tenant == tenant, _E.deleted_at.is_(None))
    )


def update_endpoint(
    endpoint_id: str, tenant: str, values: Mapping[str, Any], *, reads_results: bool
) -> Update:
    """Change an endpoint.

    Args:
        reads_results: whether the caller may read the results of jobs. If it may not, no row
            matches where the change would send results to another URL.
    """
    found = update(ENDPOINTS).where(
        _E.id == endpoint_id, _E.tenant == tenant, _E.deleted_at.is_(None)
    )
    if not reads_results and "url" in values and values.get("inline_result") is not False:
        found = found.where(or_(~_E.inline_result, _E.url == values["url"]))
    return found.values(**values).returning(_E.id)


def delete_endpoint(endpoint_id: str, tenant: str) -> Update:
    """Mark it as deleted: nobody sees it, and no event is for it any more. `remove_deleted` removes
    it with its deliveries.
    """
    return (
        update(ENDPOINTS)
        .where(_E.id == endpoint_id, _E.tenant == tenant, _E.deleted_at.is_(None))
        .values(deleted_at=func.now(), enabled=False, events=[])
        .returning(_E.id)
    )


def remove_deleted(limit: int = REMOVE_CHUNK) -> list[Delete]:
    """Statements that each remove a chunk of what deleted endpoints left: deliveries, then the
    endpoints.
    """
    first = select(_E.id).where(_E.deleted_at.is_not(None)).order_by(_E.deleted_at)
    some = select(_D.id).where(_D.endpoint_id.in_(first.limit(10))).limit(limit)
    empty = first.where(~exists().where(_D.endpoint_id == _E.id)).limit(limit)
    return [delete(DELIVERIES).where(_D.id.in_(some)), delete(ENDPOINTS).where(_E.id.in_(empty))]


def rotate_secret(endpoint_id: str, tenant: str, secret: str, *, grace_seconds: float) -> Update:
    """Another secret; for a while both sign."""
    keeps = grace_seconds > 0
    return (
        update(ENDPOINTS)
        .where(_E.id == endpoint_id, _E.tenant == tenant, _E.deleted_at.is_(None))
        .values(
            previous_secret=_E.secret if keeps else null(),
            previous_until=func.now() + seconds(grace_seconds) if keeps else null(),
            secret=secret,
        )
        .returning(_E.id)
    )


def secret_of_key(key_id: str) -> Select[Any]:
    return select(_K.webhook_secret).where(_K.id == key_id)


def secret_of_tenant(tenant: str) -> Select[Any]:
    return select(_S.secret).where(_S.tenant == tenant)


def ensure_secret(tenant: str, secret: str) -> Executable:
    return insert(SECRETS).values(tenant=tenant, secret=secret).on_conflict_do_nothing()


def rotate_secret_of_key(key_id: str, secret: str, *, grace_seconds: float) -> Update:
    """Another secret of the webhooks of single jobs; for a while both sign."""
    keeps = grace_seconds > 0
    return (
        update(ApiKey)
        .where(_K.id == key_id)
        .values(
            previous_webhook_secret=_K.webhook_secret if keeps else null(),
            previous_webhook_secret_until=func.now() + seconds(grace_seconds) if keeps else null(),
            webhook_secret=secret,
        )
        .returning(_K.webhook_secret)
    )


def rotate_secret_of_tenant(tenant: str, secret: str, *, grace_seconds: float) -> Update:
    """Likewise, of a tenant that uses no key; there is one (`ensure_secret`)."""
    keeps = grace_seconds > 0
    return (
        update(SECRETS)
        .where(_S.tenant == tenant)
        .values(
            previous_secret=_S.secret if keeps else null(),
            previous_secret_until=func.now() + seconds(grace_seconds) if keeps else null(),
            secret=secret,
        )
        .returning(_S.secret)
    )


# Deliveries, as their owner sees them


def add_test(event_id: str, endpoint_id: str, tenant: str, kind: str) -> list[Insert]:
    """An event about nothing, to one endpoint."""
    return [
        insert(EVENTS).values(id=event_id, tenant=tenant, type=kind, sequence=1),
        insert(DELIVERIES)
        .values(event_id=event_id, tenant=tenant, endpoint_id=endpoint_id)
        .returning(_D.id),
    ]


def list_deliveries(
    tenant: str,
    *,
    endpoint_id: str | None,
    job_id: str | None,
    status: str | None,
    before: int | None,
    limit: int,
) -> Select[Any]:
    """Newest first, with their events; one more than asked.

    The deliveries come from an index in the list's order; without a status they are the newest of
    each state, merged.
    """
    if job_id is not None:
        where: list[ColumnElement[bool]] = [
            _D.event_id.in_(select(_V.id).where(_V.job_id == job_id))
        ]
        if before is not None:
            where.append(_D.id < before)
        newest = select(_D.id).where(*where).order_by(_D.id.desc()).subquery("newest")
    else:
        of = (_D.tenant, tenant) if endpoint_id is None else (_D.endpoint_id, endpoint_id)
        each = [
            # As rows, so that no other index gives the order and is read to its end.
            select(_D.id)
            .where(
                tuple_(of[0], _D.status, _D.id)
                < tuple_(of[1], s, MAX_ID if before is None else before),
                tuple_(of[0], _D.status, _D.id) > tuple_(of[1], s, 0),
            )
            .order_by(of[0].desc(), _D.status.desc(), _D.id.desc())
            .limit(limit + 1)
            for s in DELIVERY_STATES
            if status in (None, s)
        ]
        merged = union_all(*(one.subquery().select() for one in each)).subquery("merged")
        newest = (
            select(merged.c.id).order_by(merged.c.id.desc()).limit(limit + 1).subquery("newest")
        )
    also = [_D.tenant == tenant]
    if endpoint_id is not None:
        also.append(_D.endpoint_id == endpoint_id)
    if status is not None:
        also.append(_D.status == status)
    return (
        select(
            _D.id,
            _D.event_id,
            _D.endpoint_id,
            _D.url,
            _D.status,
            _D.attempts,
            _D.next_attempt_at,
            _D.created_at,
            _D.delivered_at,
            _V.type,
            _V.job_id,
            _V.batch_id,
            _V.sequence,
        )
        .join_from(newest, DELIVERIES, _D.id == newest.c.id)
        .join(EVENTS, _V.id == _D.event_id)
        .where(*also)
        .order_by(newest.c.id.desc())
        .limit(limit + 1)
    )


def attempts_of(delivery_ids: Sequence[int]) -> Select[Any]:
    """The newest attempts of each, oldest first: every redelivery adds some."""
    newest = (
        func.row_number().over(partition_by=_A.delivery_id, order_by=_A.id.desc()).label("newest")
    )
    found = select(ATTEMPTS, newest).where(_A.delivery_id.in_(list(delivery_ids))).subquery()
    return (
        select(found)
        .where(found.c.newest <= ATTEMPTS_SHOWN)
        .order_by(found.c.delivery_id, found.c.id)
    )


_AGAIN: dict[str, Any] = {
    "status": "pending",
    "attempts": 0,
    "next_attempt_at": func.now(),
    "lease_until": null(),
    "delivered_at": null(),
}


def redeliver(delivery_id: int, tenant: str) -> Update:
    """Send it again, whatever became of it: the same event with the same id, the whole schedule
    anew.
    """
    return (
        update(DELIVERIES)
        .where(_D.id == delivery_id, _D.tenant == tenant)
        .values(**_AGAIN)
        .returning(_D.id)
    )


def redeliver_range(
    endpoint_id: str,
    tenant: str,
    *,
    since: datetime,
    until: datetime | None,
    statuses: Sequence[str],
    after_id: int,
    limit: int = REMOVE_CHUNK,
) -> Update:
    """The same for a chunk of what an endpoint should have got in a span of time. Returns the ids,
    all above `after_id`.
    """
    found = [
        _D.endpoint_id == endpoint_id,
        _D.tenant == tenant,
        _D.created_at >= since,
        _D.status.in_(list(statuses)),
    ]
    if until is not None:
        found.append(_D.created_at < until)
    some = select(_D.id).where(*found, _D.id > after_id).order_by(_D.id).limit(limit)
    return update(DELIVERIES).where(_D.id.in_(some)).values(**_AGAIN).returning(_D.id)


# The outbox


def receiver_of() -> ColumnElement[str]:
    """Return the receiver's name: a registered endpoint, or the tenant's host for the URL of a
    single job.
    """
    return func.coalesce(
        _D.endpoint_id, _D.tenant + " " + func.substring(_D.url, "^[a-z]+://([^/?#]*)")
    )


def _tenants_with_pending() -> CTE:
    """Tenants that wait for deliveries, found one after the other in an index: the cost is theirs,
    not the deliveries'.
    """
    pending = _D.status == "pending"
    names = select(
        select(func.min(_D.tenant)).where(pending).scalar_subquery().label("tenant")
    ).cte("tenants_waiting", recursive=True)
    following = (
        select(func.min(_D.tenant)).where(pending, _D.tenant > names.c.tenant).scalar_subquery()
    )
    names = names.union_all(select(following).where(names.c.tenant.is_not(None)))
    return (
        select(names.c.tenant)
        .where(names.c.tenant.is_not(None))
        .limit(TENANTS_MAX)
        .cte("tenants_in_turn")
    )


def lease_due(
    *,
    lease_seconds: float,
    limit: int,
    per_receiver: int,
    per_tenant: int,
    skip_from: int | None = None,
) -> Select[Any]:
    """Take deliveries that are due: at most `per_receiver` on their way to one receiver, so that a
    slow one holds up nobody, and at most `per_tenant` of one tenant, so that its slow ones together
    do not either.

    Args:
        skip_from: receivers with so many on their way are not looked at, so however many deliveries
            of theirs wait, others are found behind them; `per_receiver` if not given. 1 finds
            others also behind one that fails at once, and so never has many on their way.

    Returns (id,). A lease that runs out (the process died) makes the delivery due again.
    """
    on_their_way = (
        select(receiver_of().label("receiver"), _D.tenant)
        .where(_D.status == "pending", _D.lease_until > func.now())
        .cte("on_their_way")
    )
    busy = (
        select(on_their_way.c.receiver, func.count().label("n"))
        .group_by(on_their_way.c.receiver)
        .cte("busy")
    )
    tenants = (
        select(on_their_way.c.tenant, func.count().label("n"))
        .group_by(on_their_way.c.tenant)
        .cte("tenants")
    )
    full = select(busy.c.receiver).where(
        busy.c.n >= (per_receiver if skip_from is None else skip_from)
    )
    names = _tenants_with_pending()
    each = lateral(
        select(_D.id, receiver_of().label("receiver"), _D.tenant, _D.next_attempt_at)
        .where(
            _D.status == "pending",
            _D.tenant == names.c.tenant,
            _D.next_attempt_at <= func.now(),
            or_(_D.lease_until.is_(None), _D.lease_until <= func.now()),
            receiver_of().not_in(full),
        )
        .order_by(_D.next_attempt_at)
        # A long look when few tenants wait, a short one for each of many.
        .limit(
            select(func.greatest(per_tenant, 50 * limit / func.count()))
            .select_from(names)
            .scalar_subquery()
        )
    )
    due = (
        select(each.c.id, each.c.receiver, each.c.tenant, each.c.next_attempt_at)
        .join_from(names, each, true())
        .where(names.c.tenant.not_in(select(tenants.c.tenant).where(tenants.c.n >= per_tenant)))
        .subquery("due")
    )
    first = (due.c.next_attempt_at, due.c.id)
    ranked = (
        select(
            due.c.id,
            due.c.tenant,
            due.c.next_attempt_at,
            func.row_number().over(partition_by=due.c.receiver, order_by=first).label("rank"),
            func.coalesce(busy.c.n, 0).label("n"),
        )
        .join_from(due, busy, busy.c.receiver == due.c.receiver, isouter=True)
        .subquery("ranked")
    )
    of_tenant = (
        select(
            ranked.c.id,
            ranked.c.rank,
            ranked.c.next_attempt_at,
            func.row_number()
            .over(partition_by=ranked.c.tenant, order_by=(ranked.c.rank, ranked.c.next_attempt_at))
            .label("of_tenant"),
            func.coalesce(tenants.c.n, 0).label("n"),
        )
        .join_from(ranked, tenants, tenants.c.tenant == ranked.c.tenant, isouter=True)
        .where(ranked.c.rank + ranked.c.n <= per_receiver)
        .subquery("of_tenant")
    )
    chosen = (
        select(of_tenant.c.id)
        .where(of_tenant.c.of_tenant + of_tenant.c.n <= per_tenant)
        .order_by(
            of_tenant.c.of_tenant, of_tenant.c.next_attempt_at
        )  # the first of each tenant, then the second
        .limit(limit)
    )
    taken = (
        update(DELIVERIES)
        .where(
            _D.id.in_(chosen),
            _D.status == "pending",
            or_(_D.lease_until.is_(None), _D.lease_until <= func.now()),
        )
        .values(lease_until=func.now() + seconds(lease_seconds))
        .returning(_D.id)
        .cte("taken")
    )
    return select(taken.c.id)


def unlease(delivery_ids: Sequence[int]) -> Update:
    return (
        update(DELIVERIES)
        .where(_D.id.in_(list(delivery_ids)), _D.status == "pending")
        .values(lease_until=null())
    )


def _inlines() -> ColumnElement[bool]:
    """Return whether the body holds the job's result: the event asked for it, and the endpoint
    still does.

    A delivery that was recorded before `inline_result` was switched off must not carry the result
    to the URL that the endpoint has now.
    """
    return _D.inline_result & or_(_D.endpoint_id.is_(None), _E.inline_result)


def to_send(delivery_id: int) -> Select[Any]:
    """Select everything that one attempt needs, if it is due: a message alone brings no attempt
    forward.
    """
    return (
        select(
            _D.id,
            _D.attempts,
            _D.url,
            _D.endpoint_id,
            _D.inline_result,
            _D.tenant,
            _E.url.label("endpoint_url"),
            _E.enabled,
            _E.secret,
            case((_E.previous_until > func.now(), _E.previous_secret)).label("previous_secret"),
            _K.webhook_secret.label("key_secret"),
            _S.secret.label("tenant_secret"),
            case((_K.previous_webhook_secret_until > func.now(), _K.previous_webhook_secret)).label(
                "key_secret_before"
            ),
            case((_S.previous_secret_until > func.now(), _S.previous_secret)).label(
                "tenant_secret_before"
            ),
            _V.id.label("event_id"),
            _V.type,
            _V.job_id,
            _V.batch_id,
            _V.status,
            _V.sequence,
            _V.created_at,
            case((_inlines() & (_V.status == _J.status), _J.result)).label("result"),
            _J.traceparent,
        )
        .join_from(DELIVERIES, EVENTS, _V.id == _D.event_id)
        .join(ENDPOINTS, _E.id == _D.endpoint_id, isouter=True)
        .join(ApiKey.__table__, _K.id == _D.key_id, isouter=True)
        .join(SECRETS, _S.tenant == _D.tenant, isouter=True)
        .join(Job.__table__, _J.id == _V.job_id, isouter=True)
        .where(_D.id == delivery_id, _D.status == "pending", _D.next_attempt_at <= func.now())
    )


def note_attempt(
    delivery_id: int,
    attempt: int,
    *,
    status_code: int | None,
    error: str | None,
    duration_ms: float,
) -> Insert:
    return insert(ATTEMPTS).values(
        delivery_id=delivery_id,
        attempt=attempt,
        status_code=status_code,
        error=error,
        duration_ms=duration_ms,
    )


def close(delivery_id: int, attempts: int, status: str) -> Update:
    """delivered, failed or discarded; whoever sent the newest attempt decides."""
    return (
        update(DELIVERIES)
        .where(_D.id == delivery_id, _D.status == "pending")
        .values(
            status=status,
            attempts=attempts,
            lease_until=null(),
            delivered_at=func.now() if status == "delivered" else null(),
        )
    )


def try_later(delivery_id: int, attempts: int, *, after_seconds: float) -> Update:
    return (
        update(DELIVERIES)
        .where(_D.id == delivery_id, _D.status == "pending")
        .values(
            attempts=attempts,
            lease_until=null(),
            next_attempt_at=func.now() + seconds(after_seconds),
        )
    )


def note_success(endpoint_id: str) -> Update:
    """At most once a second: a busy endpoint's row is not a place to queue at."""
    return (
        update(ENDPOINTS)
        .where(
            _E.id == endpoint_id,
            or_(_E.last_success_at.is_(None), _E.last_success_at < func.now() - seconds(1)),
        )
        .values(last_success_at=func.now())
    )


def disable(endpoint_id: str, reason: DisabledReason) -> Update:
    return (
        update(ENDPOINTS)
        .where(_E.id == endpoint_id, _E.enabled)
        .values(enabled=False, disabled_reason=reason)
        .returning(_E.disabled_reason)
    )


def disable_dead(endpoint_id: str, delivery_id: int) -> Update:
    """After a whole schedule of attempts without one success anywhere since the event came."""
    reason: DisabledReason = "dead"
    came = select(_D.created_at).where(_D.id == delivery_id).scalar_subquery()
    return (
        update(ENDPOINTS)
        .where(
            _E.id == endpoint_id,
            _E.enabled,
            or_(_E.last_success_at.is_(None), _E.last_success_at < came),
        )
        .values(enabled=False, disabled_reason=reason)
        .returning(_E.disabled_reason)
    )


def discard_of_disabled(limit: int = REMOVE_CHUNK) -> Update:
    """A chunk of what waits for endpoints that were disabled; redelivery brings it back."""
    disabled = select(_E.id).where(~_E.enabled)
    some = select(_D.id).where(_D.endpoint_id.in_(disabled), _D.status == "pending").limit(limit)
    return update(DELIVERIES).where(_D.id.in_(some)).values(status="discarded", lease_until=null())


def forget_events(*, older_than_seconds: float, limit: int = FORGET_BATCH) -> Delete:
    """Old events with their deliveries and attempts, a batch at a time; never one that is still to
    be sent.
    """
    pending = exists().where(_D.event_id == _V.id, _D.status == "pending")
    old = (
        select(_V.id)
        .where(_V.created_at < func.now() - seconds(older_than_seconds), ~pending)
        .order_by(_V.created_at)
        .limit(limit)
    )
    return delete(EVENTS).where(_V.id.in_(old))
