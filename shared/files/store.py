"""Storage of file contents: one small interface, and the store that needs nothing but PostgreSQL.

    async with store.writer(file_id) as writer:     # whole or not at all
        await writer.write(data)
    async for data in store.read(file_id): ...
    await store.delete(file_id)

Both ways it streams, a chunk at a time. The other store, a file system or S3, is
`shared.files.objects`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from sqlalchemy import CursorResult

from shared.db.session import AsyncDatabase
from shared.errors import VDiffError
from shared.files import repository

CHUNK_BYTES = 1024 * 1024


class ContentMissing(VDiffError):
    """The content is not where the file's row says."""

    code = "file_content_missing"
    http_status = 410


class StoreUnavailable(VDiffError):
    code = "file_store_unavailable"
    http_status = 503
    retryable = True


class Writer(Protocol):
    async def write(self, data: bytes) -> None: ...


class ContentStore(Protocol):
    name: str

    def writer(self, file_id: str) -> AbstractAsyncContextManager[Writer]:
        """Write a file's content. It is stored when the block ends, and removed when the block
        raises.
        """

    def read(self, file_id: str, size: int) -> AsyncIterator[bytes]:
        """Raises ContentMissing, also in the middle."""

    async def delete(self, file_id: str) -> None:
        """A second time is as good."""


class _ChunkWriter:
    def __init__(self, database: AsyncDatabase, file_id: str) -> None:
        self._database, self._file_id = database, file_id
        self._buffer = bytearray()
        self._number = 0

    async def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._store(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    async def flush(self) -> None:
        if self._buffer:
            await self._store(bytes(self._buffer))
            self._buffer.clear()

    async def _store(self, data: bytes) -> None:
        async with self._database.write() as session:
            await session.execute(repository.insert_chunk(self._file_id, self._number, data))
        self._number += 1


class DatabaseStore:
    """Chunks as rows; they go with the file's row."""

    name = "database"

    def __init__(self, database: AsyncDatabase) -> None:
        self._database = database

    @asynccontextmanager
    async def writer(self, file_id: str) -> AsyncIterator[Writer]:
        writer = _ChunkWriter(self._database, file_id)
        try:
            yield writer
            await writer.flush()
        except BaseException:
            await self.delete(file_id)
            raise

    async def read(self, file_id: str, size: int) -> AsyncIterator[bytes]:
        seen = number = 0
        while seen < size:
            async with self._database.read() as session:  # none is held while a slow client reads
                data = (
                    await session.execute(repository.chunk(file_id, number))
                ).scalar_one_or_none()
            if data is None:
                raise ContentMissing(f"the content of {file_id} is gone")
            yield data
            seen, number = seen + len(data), number + 1

    async def delete(self, file_id: str) -> None:
        while True:
            async with self._database.write() as session:
                gone = await session.execute(repository.delete_chunks(file_id))
            if not isinstance(gone, CursorResult) or gone.rowcount < repository.CHUNKS_AT_ONCE:
                return
