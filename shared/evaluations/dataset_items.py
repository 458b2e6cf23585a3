"""Reads the dataset that a request names, a piece at a time: from a file, or a bundled one.

A dataset is read twice: once to check every line and to learn what identifies it, and once more to
store it if it is new. Neither pass holds more than a piece of the file and its items.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from sqlalchemy import Row

from shared.errors import InvalidParameter
from shared.evaluations.datasets import DatasetReader, Item, bundled_rows
from shared.evaluations.requests import NewEvaluation
from shared.files.service import FileService
from shared.files.store import ContentMissing

Datasets = Mapping[str, Callable[[], list[dict[str, Any]]]]

PIECE_BYTES = 256 * 1024  # of a file; as Python objects its lines may take 22 times as much
READS_TOGETHER = 2  # pieces that a process reads at once, tenants in turns
DATASETS_TOGETHER = 6  # datasets that a process reads at once, of one tenant all but one
Turn = Callable[[], AbstractAsyncContextManager[None]]


class DatasetSource:
    """The source of the items of one request."""

    def __init__(
        self, new: NewEvaluation, files: FileService, file: Row[Any] | None, datasets: Datasets
    ) -> None:
        self._new = new
        self._files = files
        self._file = file
        self._datasets = datasets

    @classmethod
    async def find(
        cls, new: NewEvaluation, files: FileService, datasets: Datasets, tenant: str
    ) -> DatasetSource:
        """Check that the dataset exists, without reading it. Raises FileNotFound, InvalidParameter."""
        if new.bundled is not None:
            bundled_rows(dict(datasets), new.bundled)
            return cls(new, files, None, datasets)
        assert new.file_id is not None
        file = await files.get(new.file_id, tenant, param="dataset.file_id")
        if file.purpose not in ("evals", "batch"):
            message = f"{file.id} was uploaded for {file.purpose}; a dataset has purpose evals"
            raise InvalidParameter(message, param="dataset.file_id")
        return cls(new, files, file, datasets)

    async def pieces(self, reader: DatasetReader, turn: Turn) -> AsyncGenerator[list[Item]]:
        """Yield the items, a piece at a time, each while a turn is held. Close the generator if you
        leave it early.

        Raises:
            BadDataset, MissingColumn, ContentMissing.
        """
        if self._file is None:
            assert self._new.bundled is not None
            rows = bundled_rows(dict(self._datasets), self._new.bundled)
            async with turn():
                yield [reader.add(row, line) for line, row in enumerate(rows[: self._new.limit], 1)]
            return
        try:
            async for data in self._files.read(self._file):
                for start in range(0, len(data), PIECE_BYTES):
                    async with turn():
                        yield await asyncio.to_thread(
                            _items_of, reader, data[start : start + PIECE_BYTES]
                        )
                    if reader.full:
                        return
            async with turn():
                yield await asyncio.to_thread(lambda: list(reader.finish()))
        except ContentMissing as exc:
            exc.param = "dataset.file_id"
            raise


def _items_of(reader: DatasetReader, piece: bytes) -> list[Item]:
    return list(reader.feed(piece))
