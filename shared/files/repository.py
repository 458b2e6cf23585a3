"""All SQL about files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import (
    Delete,
    Insert,
    Select,
    Table,
    Update,
    delete,
    func,
    insert,
    or_,
    select,
    union_all,
    update,
)

from shared.batches.status import BatchStatus
from shared.db import serial
from shared.db.expressions import seconds
from shared.db.tables import Batch, File, FileChunk

FILES = cast(Table, File.__table__)
CHUNKS = cast(Table, FileChunk.__table__)
BATCHES = cast(Table, Batch.__table__)
_F, _C, _B = FILES.c, CHUNKS.c, BATCHES.c
CLEAN_BATCH = 20
CHUNKS_AT_ONCE = 64  # chunks of a megabyte that one transaction deletes


def _needed() -> Any:
    """A batch still reads the file: it validates its lines, or makes jobs of them."""
    return (
        select(_B.id)
        .where(
            _B.input_file_id == _F.id,
            or_(
                _B.status == BatchStatus.VALIDATING.value,
                _B.status.in_((BatchStatus.IN_PROGRESS.value, BatchStatus.CANCELLING.value))
                & (_B.stored < _B.total),
            ),
        )
        .exists()
    )


def stored_bytes(tenant: str) -> Select[Any]:
    """(bytes,) of the tenant's files that can be seen."""
    return select(func.coalesce(func.sum(_F.bytes), 0)).where(
        _F.tenant == tenant, _F.status == "ready"
    )


def lock_storing(tenant: str) -> Select[Any]:
    """Keep other transactions with this lock from adding to the tenant's files until COMMIT."""
    return select(*serial.lock(f"files {tenant}"))


def begin(file_id: str, *, tenant: str, filename: str, purpose: str, store: str) -> Insert:
    return insert(FILES).values(
        id=file_id, tenant=tenant, filename=filename, purpose=purpose, store=store
    )


def make_ready(
    file_id: str, *, size: int, filename: str, purpose: str, expires_seconds: float | None
) -> Update:
    """The content is whole: from now on the file can be seen. Returns its row."""
    expires = None if expires_seconds is None else _F.created_at + seconds(expires_seconds)
    return (
        update(FILES)
        .where(_F.id == file_id, _F.status == "uploading")
        .values(status="ready", bytes=size, filename=filename, purpose=purpose, expires_at=expires)
        .returning(*_F)
    )


def get(file_id: str, tenant: str) -> Select[Any]:
    alive = or_(_F.expires_at.is_(None), _F.expires_at > func.now(), _needed())
    return select(FILES).where(_F.id == file_id, _F.tenant == tenant, _F.status == "ready", alive)


def get_locked(file_id: str, tenant: str) -> Select[Any]:
    """Against a deletion at the same time."""
    return get(file_id, tenant).with_for_update(read=True)


def list_files(
    tenant: str, *, purpose: str | None, after: str | None, ascending: bool, limit: int
) -> Select[Any]:
    """One row more than asked."""
    query = select(FILES).where(_F.tenant == tenant, _F.status == "ready")
    query = query.where(or_(_F.expires_at.is_(None), _F.expires_at > func.now()))
    if purpose is not None:
        query = query.where(_F.purpose == purpose)
    if after is not None:
        query = query.where(_F.id > after if ascending else _F.id < after)
    return query.order_by(_F.id if ascending else _F.id.desc()).limit(limit + 1)


def lock(file_id: str, tenant: str) -> Select[Any]:
    """The row, locked, and whether a batch still needs it; the check runs under the lock when
    repeated after it.
    """
    return (
        select(_F.id)
        .where(_F.id == file_id, _F.tenant == tenant, _F.status == "ready")
        .with_for_update()
    )


def start_deleting(file_ids: Sequence[str]) -> Update:
    """Nobody sees them from now on; returns the ids, without those that a batch still needs."""
    return (
        update(FILES)
        .where(_F.id.in_(list(file_ids)), _F.status != "deleting", ~_needed())
        .values(status="deleting")
        .returning(_F.id)
    )


def delete_row(file_id: str) -> Delete:
    return delete(FILES).where(_F.id == file_id, _F.status == "deleting")


def due(*, upload_seconds: float) -> Select[Any]:
    """(id, store, status) of what is to go: expired, deleted in part, or an upload that nobody
    finished.
    """
    columns = (_F.id, _F.store, _F.status)
    begun = (_F.status == "uploading") & (_F.created_at < func.now() - seconds(upload_seconds))
    unfinished = (
        select(*columns)
        .where(_F.status != "ready", or_(_F.status == "deleting", begun))
        .limit(CLEAN_BATCH)
    )
    expired = (
        select(*columns)
        .where(_F.status == "ready", _F.expires_at < func.now(), ~_needed())
        .limit(CLEAN_BATCH)
    )
    return union_all(unfinished, expired).subquery("due").select()


def insert_chunk(file_id: str, number: int, data: bytes) -> Insert:
    return insert(CHUNKS).values(file_id=file_id, number=number, data=data)


def chunk(file_id: str, number: int) -> Select[Any]:
    return select(_C.data).where(_C.file_id == file_id, _C.number == number)


def delete_chunks(file_id: str) -> Delete:
    """Delete some of the chunks; rowcount 0 when none is left."""
    some = select(_C.number).where(_C.file_id == file_id).limit(CHUNKS_AT_ONCE)
    return delete(CHUNKS).where(_C.file_id == file_id, _C.number.in_(some))
