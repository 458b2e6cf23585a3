"""Content on a file system or in an object store (S3, GCS, Azure), by the obstore library:
VDIFF_FILE_STORE is its URL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigurationError
from shared.files.store import CHUNK_BYTES, ContentMissing, StoreUnavailable, Writer

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 1024 * 1024  # of a multipart upload


def open_store(url: str) -> ObjectStoreContent:
    """Raises ConfigurationError: no such kind of store, or obstore is not installed."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            "VDIFF_FILE_STORE needs `pip install 'vdiff[api]'`", param="file_store"
        ) from exc
    try:
        if url.startswith("file://"):
            folder = Path(url.removeprefix("file://"))
            folder.mkdir(parents=True, exist_ok=True)
            return ObjectStoreContent(LocalStore(folder))
        return ObjectStoreContent(from_url(url))
    except (BaseError, OSError, ValueError) as exc:
        raise ConfigurationError(f"VDIFF_FILE_STORE: {exc}", param="file_store") from exc


class _ObjectWriter:
    """Raises StoreUnavailable. obstore's writers speak in OSErrors, which elsewhere mean the
    database.
    """

    def __init__(self, writer: Any, file_id: str) -> None:
        self._writer, self._file_id = writer, file_id

    async def write(self, data: bytes) -> None:
        await self._done(self._writer.write(data))

    async def close(self) -> None:
        await self._done(self._writer.close())

    async def _done(self, doing: Awaitable[Any]) -> None:
        from obstore.exceptions import BaseError

        try:
            await doing
        except (BaseError, OSError) as exc:
            raise StoreUnavailable(
                f"the file store does not take {self._file_id}: {type(exc).__name__}"
            ) from exc


class ObjectStoreContent:
    """One object a file. A multipart upload becomes visible whole, at its end."""

    name = "objects"

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def _key(file_id: str) -> str:
        return f"files/{file_id}"

    @asynccontextmanager
    async def writer(self, file_id: str) -> AsyncIterator[Writer]:
        import obstore

        target = obstore.open_writer_async(self._store, self._key(file_id), buffer_size=PART_BYTES)
        writer = _ObjectWriter(target, file_id)
        yield writer
        await writer.close()

    async def read(self, file_id: str, size: int) -> AsyncIterator[bytes]:
        import obstore
        from obstore.exceptions import BaseError, NotFoundError

        seen = 0
        try:
            found = await obstore.get_async(self._store, self._key(file_id))
            async for data in found.stream(min_chunk_size=CHUNK_BYTES):
                seen += len(data)
                yield bytes(data)
        except (NotFoundError, FileNotFoundError) as exc:
            raise ContentMissing(f"the content of {file_id} is gone") from exc
        except BaseError as exc:
            raise StoreUnavailable(
                f"the file store does not give {file_id}: {type(exc).__name__}"
            ) from exc
        if seen != size:
            raise ContentMissing(
                f"{file_id} has {seen} bytes in the file store and should have {size}"
            )

    async def delete(self, file_id: str) -> None:
        import obstore
        from obstore.exceptions import BaseError, NotFoundError

        try:
            await obstore.delete_async(self._store, self._key(file_id))
        except (NotFoundError, FileNotFoundError):
            return
        except BaseError as exc:
            raise StoreUnavailable(
                f"the file store does not delete {file_id}: {type(exc).__name__}"
            ) from exc
