"""Models and the workers that serve them: statements for both sides, as in
`shared.jobs.repository`.

A worker registers its model (card and tokenizer files) and itself, then beats; the API lists models
and asks who lives. A job for a model that nobody ever registered is 404; for one whose workers are
only away it queues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from sqlalchemy import (
    Delete,
    Insert,
    Select,
    Table,
    Update,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from shared.db.expressions import seconds
from shared.db.tables import Model, Worker, WorkerFailure
from shared.model_card import ModelCard
from shared.strict_json import storable

MODELS = cast(Table, Model.__table__)
WORKERS = cast(Table, Worker.__table__)
FAILURES = cast(Table, WorkerFailure.__table__)
_M = MODELS.c
_W = WORKERS.c
_F = FAILURES.c
FAILURE_MESSAGE_MAX = 2_000
FAILURES_SHOWN_SECONDS = 24 * 3600.0
FAILURE_UNTRIED_SECONDS = 600.0  # longer than any supervisor waits between two attempts
FAILURES_KEPT_SECONDS = 7 * 24 * 3600.0

WorkerState = Literal["loading", "ready", "draining", "stopped"]


def tokenizer_hash(files: Mapping[str, str]) -> str:
    """Tells whether an API process may keep the tokenizer that it has built."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def register_model(card: ModelCard, tokenizer_files: Mapping[str, str]) -> Insert:
    """Insert the model, or replace its card; `position` stays what the first registration gave it."""
    values = {
        "card": card.to_json(),
        "tokenizer_files": dict(tokenizer_files),
        "tokenizer_hash": tokenizer_hash(tokenizer_files),
    }
    return (
        insert(MODELS)
        .values(name=card.name, **values)
        .on_conflict_do_update(index_elements=[_M.name], set_={**values, "updated_at": func.now()})
    )


def register_worker(
    worker_id: str,
    *,
    model: str,
    revision: str | None,
    hostname: str,
    pid: int,
    device: str,
    slots: int,
    version: str,
) -> Insert:
    """A worker is ready to take jobs; `revision` is that of its model, or None where the model has
    none.
    """
    return (
        insert(WORKERS)
        .values(
            id=worker_id,
            model=model,
            revision=revision or "",
            hostname=hostname,
            pid=pid,
            device=device,
            slots=slots,
            version=version,
            state="ready",
        )
        .on_conflict_do_nothing(index_elements=[_W.id])
    )


def beat(worker_id: str, *, state: WorkerState, stats: Mapping[str, Any]) -> Update:
    """The worker lives, and this is how it is doing."""
    return (
        update(WORKERS)
        .where(_W.id == worker_id)
        .values(state=state, stats=dict(stats), last_beat_at=func.now())
    )


def set_worker_state(worker_id: str, state: WorkerState) -> Update:
    return update(WORKERS).where(_W.id == worker_id).values(state=state, last_beat_at=func.now())


def mark_stopped(worker_id: str) -> Update:
    """The worker left in good order."""
    return set_worker_state(worker_id, "stopped")


def stop_silent_workers(*, silent_seconds: float) -> Update:
    """Workers that died without a word: call them stopped once nobody can expect them back."""
    return (
        update(WORKERS)
        .where(_W.state != "stopped", _W.last_beat_at < func.now() - seconds(silent_seconds))
        .values(state="stopped")
        .returning(_W.id)
    )


def live_workers(*, stale_seconds: float, model: str | None = None) -> Select[Any]:
    """Workers heard of lately that take jobs, oldest first; of one model or of all."""
    statement = (
        select(WORKERS)
        .where(_W.state == "ready", _W.last_beat_at >= func.now() - seconds(stale_seconds))
        .order_by(_W.started_at, _W.id)
    )
    return statement if model is None else statement.where(_W.model == model)


def live_slots(model: str, *, stale_seconds: float) -> Select[Any]:
    """Return the slots of the model's live workers, summed up."""
    return select(func.coalesce(func.sum(_W.slots), 0)).where(
        _W.state == "ready",
        _W.last_beat_at >= func.now() - seconds(stale_seconds),
        _W.model == model,
    )


def recent_workers(*, stale_seconds: float, limit: int = 200) -> Select[Any]:
    """All columns and `live`, of workers that did not leave long ago: those that live first, then
    the latest seen.
    """
    live = (_W.state != "stopped") & (_W.last_beat_at >= func.now() - seconds(stale_seconds))
    day = seconds(24 * 3600)
    return (
        select(WORKERS, live.label("live"))
        .where(_W.last_beat_at > func.now() - day)
        .order_by(live.desc(), _W.last_beat_at.desc(), _W.id)
        .limit(limit)
    )


def record_failure(
    *, hostname: str, model: str, code: str, message: str, pid: int, version: str
) -> Insert:
    """A worker could not load its model; a supervisor that tries again and again counts up one row."""
    values = {
        "code": code,
        "message": storable(message[:FAILURE_MESSAGE_MAX]),
        "pid": pid,
        "version": version,
    }
    return (
        insert(FAILURES)
        .values(hostname=hostname, model=model, **values)
        .on_conflict_do_update(
            index_elements=[_F.hostname, _F.model],
            set_={**values, "count": _F.count + 1, "last_at": func.now()},
        )
    )


def forget_failures(*, hostname: str, model: str) -> Delete:
    """A worker has started there. Gone is the failure of the same model, what nobody there has
    tried again for a while (its settings were mended, and the name with them), and what is a week
    old.
    """
    untried = _F.last_at < func.now() - seconds(FAILURE_UNTRIED_SECONDS)
    return delete(FAILURES).where(
        ((_F.hostname == hostname) & ((_F.model == model) | untried))
        | (_F.last_at < func.now() - seconds(FAILURES_KEPT_SECONDS))
    )


def recent_failures(*, limit: int = 50) -> Select[Any]:
    """Workers that could not load their model in the last day, the latest first."""
    recent = _F.last_at > func.now() - seconds(FAILURES_SHOWN_SECONDS)
    return select(FAILURES).where(recent).order_by(_F.last_at.desc()).limit(limit)


def all_workers() -> Select[Any]:
    """(model, stats) of every worker that ever was."""
    return select(_W.model, _W.stats)


def foldable_workers(*, older_than_seconds: float, limit: int = 500) -> Select[Any]:
    """(id, model, stats) of workers that stopped long ago, of models with more than one of them; a
    model's together.
    """
    old = (
        select(
            _W.id,
            _W.model,
            _W.stats,
            _W.started_at,
            func.count().over(partition_by=_W.model).label("n"),
        )
        .where(_W.state == "stopped", _W.last_beat_at < func.now() - seconds(older_than_seconds))
        .subquery("old")
    )
    c = old.c
    return (
        select(c.id, c.model, c.stats)
        .where(c.n > 1)
        .order_by(c.model, c.started_at, c.id)
        .limit(limit)
    )


def keep_stats(worker_id: str, stats: Mapping[str, Any]) -> Update:
    """Store the counts of a stopped worker, with those that it took over. This is no sign of life."""
    return update(WORKERS).where(_W.id == worker_id).values(stats=dict(stats))


def delete_workers(worker_ids: Sequence[str]) -> Delete:
    return delete(WORKERS).where(_W.id.in_(list(worker_ids)))


def list_models() -> Select[Any]:
    """(name, card, tokenizer_hash, created_at) in the order of first registration."""
    return select(_M.name, _M.position, _M.card, _M.tokenizer_hash, _M.created_at).order_by(
        _M.position
    )


def get_model(name: str) -> Select[Any]:
    """The whole row, tokenizer files included."""
    return select(MODELS).where(_M.name == name)
