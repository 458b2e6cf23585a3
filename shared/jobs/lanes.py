"""All SQL of the dispatcher: what is queued per lane, the candidates of a round, and what the round
writes.

Each statement costs the same whether a thousand jobs wait or a million. Sums come from `lanes` and
the few `lane_deltas` that are not summed up yet. Candidates are the first entries per lane of
`ix_jobs_unpushed`, which has only jobs that may be pushed:
a lane whose jobs are all pushed, or all suspects (`shared.jobs.suspects`), costs one look into that
index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    BigInteger,
    Delete,
    Executable,
    FromClause,
    Select,
    Table,
    Update,
    delete,
    exists,
    extract,
    func,
    lateral,
    literal,
    select,
    true,
    tuple_,
    union_all,
    update,
    values,
)
from sqlalchemy import cast as cast_to
from sqlalchemy.dialects.postgresql import insert

from shared.db import serial
from shared.db.expressions import seconds
from shared.db.tables import ApiKey, Lane, LaneDelta, Queue
from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus, Priority
from shared.jobs.turns import Who

LANES = cast(Table, Lane.__table__)
DELTAS = cast(Table, LaneDelta.__table__)
QUEUES = cast(Table, Queue.__table__)
KEYS = cast(Table, ApiKey.__table__)
LaneName = tuple[str, str, str, str]  # as in `_OF`
_J, _L, _D, _Q = JOBS.c, LANES.c, DELTAS.c, QUEUES.c
_OF = ("model", "priority", "tenant", "key_id")  # what names a lane
ROLLUP_BATCH = 20_000
ROLLUP_FROM = 500  # changes that a dispatcher without other work sums up
_UNPUSHED = (_J.status == JobStatus.QUEUED.value, _J.pushed_at.is_(None), _J.isolation.is_(None))
AHEAD_MAX = 1_000  # jobs of one's own lane that are counted one by one


def roll_up() -> Executable:
    """Move what changed into `lanes`; two at once share the work."""
    some = select(_D.id).order_by(_D.id).limit(ROLLUP_BATCH).with_for_update(skip_locked=True)
    gone = delete(DELTAS).where(_D.id.in_(some)).returning(*DELTAS.c).cte("gone")
    sums = (
        select(*(gone.c[name] for name in _OF), func.sum(gone.c.jobs), func.sum(gone.c.tokens))
        .group_by(*(gone.c[name] for name in _OF))
        .order_by(*(gone.c[name] for name in _OF))  # always locked in one order: no deadlock
    )
    adding = insert(LANES).from_select([*_OF, "jobs", "tokens"], sums)
    return adding.on_conflict_do_update(
        index_elements=[_L[name] for name in _OF],
        set_={"jobs": _L.jobs + adding.excluded.jobs, "tokens": _L.tokens + adding.excluded.tokens},
    )


def forget_idle_lanes() -> Delete:
    """Lanes that are empty and have no turn to wait for; they begin anew as if they had never been."""
    behind = (
        select(_Q.clock).where(_Q.model == _L.model, _Q.priority == _L.priority).scalar_subquery()
    )
    return delete(LANES).where(_L.jobs <= 0, _L.clock <= func.coalesce(behind, 0.0))


def _now() -> Any:
    """Lanes with what was not summed up yet."""
    return union_all(
        select(*(_L[name] for name in _OF), _L.jobs, _L.tokens),
        select(*(_D[name] for name in _OF), _D.jobs, _D.tokens),
    ).subquery("lanes_now")


def lock_adding(tenant: str, key_id: str) -> Select[Any]:
    """Keep other transactions with this lock from adding to the key's queue until COMMIT."""
    return select(*serial.lock(f"queue {tenant} {key_id}"))


def queued_of(tenant: str, key_id: str) -> Select[Any]:
    """(jobs, tokens) that a key has queued."""
    now = _now()
    return select(
        func.coalesce(func.sum(now.c.jobs), 0), func.coalesce(func.sum(now.c.tokens), 0)
    ).where(now.c.tenant == tenant, now.c.key_id == key_id)


def depths(model: str | None = None) -> Select[Any]:
    """(model, priority, tenant, key_id, jobs, tokens) of every lane that has jobs; of one model or
    of all.
    """
    now = _now()
    jobs, tokens = (
        cast_to(func.sum(column), BigInteger) for column in (now.c.jobs, now.c.tokens)
    )  # sums are numeric
    return (
        select(*(now.c[name] for name in _OF), jobs.label("jobs"), tokens.label("tokens"))
        .where(true() if model is None else now.c.model == model)
        .group_by(*(now.c[name] for name in _OF))
        .having(jobs > 0)
    )


def oldest(of: Sequence[LaneName]) -> Select[Any]:
    """(model, priority, tenant, key_id, seconds) since the first job of each lane without a
    deadline came.
    """
    wanted = values(*(_L[name] for name in _OF), name="wanted").data(list(of))
    first = lateral(
        select(_J.queued_at)
        .where(
            *(_J[name] == wanted.c[name] for name in _OF),
            _J.status == JobStatus.QUEUED.value,
            _J.deadline.is_(None),
        )
        .order_by(_J.queued_at)
        .limit(1)
    )
    return select(
        *(wanted.c[name] for name in _OF),
        extract("epoch", func.now() - first.c.queued_at).label("seconds"),
    ).join_from(wanted, first, true())


def ahead_in_lane(row: Mapping[Any, Any]) -> Select[Any]:
    """Count the jobs of the same lane that come before this one, to `AHEAD_MAX`; suspects take no
    turns.
    """
    lane = (
        *(_J[name] == row[name] for name in _OF),
        _J.status == JobStatus.QUEUED.value,
        _J.isolation.is_(None),
    )
    mine = (row["queued_at"], row["id"])
    if row["deadline"] is not None:
        before = select(_J.id).where(
            *lane, tuple_(_J.deadline, _J.queued_at, _J.id) < tuple_(row["deadline"], *mine)
        )
        return select(func.count()).select_from(before.limit(AHEAD_MAX).subquery())
    urgent = select(_J.id).where(*lane, _J.deadline.is_not(None)).limit(AHEAD_MAX)
    earlier = select(_J.id).where(
        *lane, _J.deadline.is_(None), tuple_(_J.queued_at, _J.id) < tuple_(*mine)
    )
    return select(func.count()).select_from(union_all(urgent, earlier.limit(AHEAD_MAX)).subquery())


def ensure_queue(model: str, priority: str) -> Executable:
    return insert(QUEUES).values(model=model, priority=priority).on_conflict_do_nothing()


def lock_queue(model: str, priority: str) -> Select[Any]:
    """The queue's clock; nothing while another process dispatches from it."""
    return (
        select(_Q.clock)
        .where(_Q.model == model, _Q.priority == priority)
        .with_for_update(skip_locked=True)
    )


def unpushed(model: str) -> Select[Any]:
    """One row: per priority, whether a job waits to be pushed; `changes`, whether `roll_up` has
    much to sum up.
    """
    # In the order of `ix_jobs_unpushed`. The planner ignores the order within EXISTS and may then
    # scan the table, because it expects a match early in it.
    order = (_J.tenant, _J.key_id, _J.deadline, _J.queued_at, _J.id)
    mine = select(_J.id).where(_J.model == model, *_UNPUSHED).order_by(*order).limit(1)
    waits: list[Any] = [
        mine.where(_J.priority == priority.value)
        .scalar_subquery()
        .is_not(None)
        .label(priority.value)
        for priority in Priority
    ]
    changes = exists(select(_D.id).offset(ROLLUP_FROM - 1).limit(1)).label("changes")
    return select(*waits, changes)


def candidates(
    model: str, priority: str, *, clock: float, lanes: int, per_lane: int
) -> Select[Any]:
    """(tenant, key_id, clock, weight, id): the first jobs to be pushed, of the lanes with such jobs
    whose turns come first.
    """

    def of_lane(lane: FromClause, *columns: Any) -> Select[Any]:
        return select(*columns).where(
            _J.model == model,
            _J.priority == priority,
            _J.tenant == lane.c.tenant,
            _J.key_id == lane.c.key_id,
            *_UNPUSHED,
        )

    # LIMIT 1 keeps the planner from reading every unpushed job to join them with the lanes.
    order = (_J.deadline, _J.queued_at, _J.id)
    any_job = lateral(
        of_lane(LANES, literal(1).label("found")).order_by(*order).limit(1), name="any_job"
    )
    first = (
        select(_L.tenant, _L.key_id, _L.clock, func.coalesce(KEYS.c.weight, 1).label("weight"))
        .join_from(LANES, any_job, true())
        .join(KEYS, KEYS.c.id == _L.key_id, isouter=True)
        .where(_L.model == model, _L.priority == priority, _L.jobs > 0)
        .order_by(func.greatest(_L.clock, clock), _L.tenant, _L.key_id)
        .limit(lanes)
        .subquery("first")
    )
    jobs = lateral(
        of_lane(first, _J.id, _J.deadline, _J.queued_at).order_by(*order).limit(per_lane)
    )
    return (
        select(first.c.tenant, first.c.key_id, first.c.clock, first.c.weight, jobs.c.id)
        .join_from(first, jobs, true())
        .order_by(first.c.tenant, first.c.key_id, jobs.c.deadline, jobs.c.queued_at, jobs.c.id)
    )


def take(job_ids: Sequence[str]) -> Update:
    """Note that these jobs' messages are about to be pushed; returns the ids of those that still
    wait for one.
    """
    return (
        update(JOBS)
        .where(
            _J.id.in_(list(job_ids)), _J.status == JobStatus.QUEUED.value, _J.pushed_at.is_(None)
        )
        .values(pushed_at=func.now())
        .returning(_J.id)
    )


def untake(job_ids: Sequence[str]) -> Update:
    """Redis did not take them: another round may."""
    return (
        update(JOBS)
        .where(_J.id.in_(list(job_ids)), _J.status == JobStatus.QUEUED.value)
        .values(pushed_at=None)
    )


def set_clocks(model: str, priority: str, lane_clocks: Mapping[Who, float]) -> Update:
    clocks = values(_L.tenant, _L.key_id, _L.clock, name="clocks").data(
        [(*who, at) for who, at in lane_clocks.items()]
    )
    return (
        update(LANES)
        .where(
            _L.model == model,
            _L.priority == priority,
            _L.tenant == clocks.c.tenant,
            _L.key_id == clocks.c.key_id,
        )
        .values(clock=clocks.c.clock)
    )


def set_queue_clock(model: str, priority: str, clock: float) -> Update:
    return update(QUEUES).where(_Q.model == model, _Q.priority == priority).values(clock=clock)


def outcomes(model: str, *, within_seconds: float, limit: int = 200) -> Select[Any]:
    """(forecast, actual) seconds of jobs that succeeded lately, newest first."""
    actual = extract("epoch", _J.finished_at - _J.created_at)
    return (
        select(_J.forecast_seconds.label("forecast"), actual.label("actual"))
        .where(
            _J.finished_at > func.now() - seconds(within_seconds),
            _J.status == JobStatus.SUCCEEDED.value,
            _J.model == model,
            _J.forecast_seconds.is_not(None),
            _J.life == 1,
        )
        .order_by(_J.finished_at.desc())
        .limit(limit)
    )
