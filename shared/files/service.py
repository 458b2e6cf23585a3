"""Files as requests see them: written in a stream, whole or not at all; read in a stream; deleted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import structlog
from sqlalchemy import Row

from shared.db.serial import LockTimeout, SerialWrites
from shared.db.session import AsyncDatabase
from shared.errors import BodyTooLarge, Conflict, NotFound, QuotaExceeded
from shared.files import repository
from shared.files.store import ContentStore, DatabaseStore, StoreUnavailable, Writer
from shared.ids import may_be_an_id, new_id
from shared.text_files import HEAD_BYTES

PURPOSES = ("batch", "evals")  # what a client may upload; `batch_output` is ours
OUTPUT_PURPOSE = "batch_output"
UPLOAD_SECONDS = 24 * 3600.0  # an upload older than that is nobody's

_log = structlog.get_logger(__name__)


class FileNotFound(NotFound):
    code = "file_not_found"


def new_file_id() -> str:
    """OpenAI's form, with a hyphen."""
    return new_id("file").replace("_", "-", 1)


class Upload:
    """A file being written. `bytes` counts; what it is called may become known at the end only."""

    def __init__(
        self,
        file_id: str,
        writer: Writer,
        max_bytes: int,
        expires_seconds: float | None = None,
        tenant: str = "",
    ) -> None:
        self.id = file_id
        self.bytes = 0
        self.head = b""  # the first bytes, which show the encoding
        self.filename = ""
        self.purpose = ""
        self.expires_seconds = expires_seconds
        self.tenant = tenant
        self._writer = writer
        self._max = max_bytes

    async def write(self, data: bytes) -> None:
        """Raises BodyTooLarge."""
        if len(self.head) < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - len(self.head)]
        self.bytes += len(data)
        if self.bytes > self._max:
            raise BodyTooLarge(f"the file is larger than {self._max} bytes", param="file")
        await self._writer.write(data)


class FileService:
    def __init__(
        self,
        database: AsyncDatabase,
        objects: ContentStore | None,
        *,
        max_bytes: int,
        expires_seconds: float | None = None,
        quota_bytes: int | None = None,
        lists: AsyncDatabase | None = None,
    ) -> None:
        """Make the service.

        Args:
            expires_seconds: how long a file is kept that does not say; None is for ever.
            quota_bytes: what one tenant's files may take together; None is no limit. Files that
                batches write count too, but are never refused: their answers were paid for.
            lists: the database as lists read it, if that is another one.
        """
        self._database = database
        self._storing = SerialWrites(database, "the files of this tenant")
        self._lists = lists or database
        self._expires_seconds = expires_seconds
        self._quota_bytes = quota_bytes
        self._max_bytes = max_bytes
        stores: list[ContentStore] = [
            DatabaseStore(database),
            *([objects] if objects is not None else []),
        ]
        self._stores: Mapping[str, ContentStore] = {store.name: store for store in stores}
        self._store = stores[-1]  # of new files

    def _store_of(self, name: str) -> ContentStore:
        if name not in self._stores:
            raise StoreUnavailable(f"the file is in the store {name!r}, which is not set up now")
        return self._stores[name]

    @asynccontextmanager
    async def upload(
        self, tenant: str, *, purpose: str, max_bytes: int | None = None
    ) -> AsyncIterator[Upload]:
        """Visible when `publish` was called, gone when the block raises before."""
        file_id = new_file_id()
        if self._quota_bytes is not None and max_bytes is None:
            async with self._database.read() as session:
                stored = (await session.execute(repository.stored_bytes(tenant))).scalar_one()
            if stored >= self._quota_bytes:  # before anything is read
                raise self._full(stored, 1)
        async with self._database.write() as session:
            statement = repository.begin(
                file_id, tenant=tenant, filename="", purpose=purpose, store=self._store.name
            )
            await session.execute(statement)
        try:
            async with self._store.writer(file_id) as writer:
                most = self._max_bytes if max_bytes is None else max_bytes
                upload = Upload(file_id, writer, most, self._expires_seconds, tenant)
                upload.purpose = purpose
                yield upload
        except BaseException:
            await self._discard(file_id)
            raise

    async def publish(self, upload: Upload) -> Row[Any]:
        """Make a whole upload visible, if its tenant has room for it; call it after the block of
        `upload`.

        Raises:
            QuotaExceeded: the tenant's files would take more than its quota. The upload is gone
                then.
            LockTimeout: other uploads of the tenant took too long. The upload is gone then.
        """
        if self._quota_bytes is None:
            async with self._database.write() as session:
                return (await session.execute(publish_statement(upload))).one()
        try:
            async with self._storing.write(upload.tenant) as session:
                await session.execute(repository.lock_storing(upload.tenant))
                stored = (
                    await session.execute(repository.stored_bytes(upload.tenant))
                ).scalar_one()
                if stored + upload.bytes <= self._quota_bytes:
                    return (await session.execute(publish_statement(upload))).one()
        except LockTimeout:
            await self._discard(upload.id)
            raise
        await self._discard(upload.id)
        raise self._full(stored, upload.bytes)

    def _full(self, stored: int, more: int) -> QuotaExceeded:
        return QuotaExceeded(
            f"the files of this tenant take {stored} bytes, this would add {more}, and {self._quota_bytes} may be "
            "stored (VDIFF_MAX_STORED_FILE_BYTES); delete files that are no longer needed",
            param="file",
        )

    async def _discard(self, file_id: str) -> None:
        async with self._database.write() as session:
            await session.execute(repository.start_deleting([file_id]))
        await self._finish_deleting(file_id, self._store.name)

    async def _finish_deleting(self, file_id: str, store: str) -> None:
        await self._store_of(store).delete(file_id)
        async with self._database.write() as session:
            await session.execute(repository.delete_row(file_id))

    async def get(self, file_id: str, tenant: str, *, param: str = "file_id") -> Row[Any]:
        """Raises FileNotFound."""
        if may_be_an_id(file_id):
            async with self._database.read() as session:
                row: Row[Any] | None = (
                    await session.execute(repository.get(file_id, tenant))
                ).one_or_none()
            if row is not None:
                return row
        raise FileNotFound(f"no file {file_id[:80]!r}", param=param)

    def read(self, row: Row[Any]) -> AsyncIterator[bytes]:
        return self._store_of(row.store).read(row.id, row.bytes)

    async def page(self, tenant: str, **query: Any) -> list[Row[Any]]:
        async with self._lists.read() as session:
            return list((await session.execute(repository.list_files(tenant, **query))).all())

    async def delete(self, file_id: str, tenant: str) -> None:
        """Raises FileNotFound, Conflict (a batch still reads it)."""
        row = await self.get(file_id, tenant)
        async with self._database.write() as session:
            await session.execute(repository.lock(file_id, tenant))
            gone = (await session.execute(repository.start_deleting([file_id]))).all()
        if not gone:
            raise Conflict(
                "a batch still reads this file; cancel the batch, or wait until its lines are jobs",
                param="file_id",
                code="file_in_use",
            )
        await self._finish_deleting(file_id, row.store)

    async def clean(self) -> bool:
        """Finish some of what is due: expired files, deletions and uploads that were cut off.
        Return whether any went.
        """
        async with self._database.read() as session:
            rows = (await session.execute(repository.due(upload_seconds=UPLOAD_SECONDS))).all()
        cleaned = 0
        for row in rows:
            async with self._database.write() as session:
                gone = (
                    row.status == "deleting"
                    or (await session.execute(repository.start_deleting([row.id]))).all()
                )
            if not gone:
                continue
            try:
                await self._finish_deleting(row.id, row.store)
                cleaned += 1
            except StoreUnavailable as exc:
                _log.warning("file_not_cleaned", file_id=row.id, error=exc.message)
        return cleaned > 0


def publish_statement(upload: Upload) -> Any:
    return repository.make_ready(
        upload.id,
        size=upload.bytes,
        filename=upload.filename,
        purpose=upload.purpose,
        expires_seconds=upload.expires_seconds,
    )


def file_object(row: Row[Any]) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": None if row.expires_at is None else int(row.expires_at.timestamp()),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }
