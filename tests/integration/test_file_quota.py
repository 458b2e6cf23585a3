"""The quota of one tenant's files: refused by name, exact also when uploads race, and per tenant."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from shared.db.session import AsyncDatabase
from shared.errors import QuotaExceeded
from shared.files.service import FileService
from tests.integration.conftest import Jobs

pytestmark = pytest.mark.integration
QUOTA = 1000


async def upload(files: FileService, tenant: str, size: int) -> str:
    async with files.upload(tenant, purpose="batch") as made:
        await made.write(b"x" * size)
        made.filename = "f"
    return str((await files.publish(made)).id)


def test_a_tenants_files_take_no_more_than_its_quota(jobs: Jobs) -> None:
    async def run() -> None:
        database = AsyncDatabase(jobs.database_url)
        try:
            files = FileService(database, None, max_bytes=10_000, quota_bytes=QUOTA)
            first = await upload(files, "a", 600)
            with pytest.raises(
                QuotaExceeded, match="take 600 bytes, this would add 401, and 1000 may be"
            ) as refused:
                await upload(files, "a", 401)
            assert refused.value.param == "file"
            await upload(files, "b", 1000)  # another tenant
            await upload(files, "a", 400)
            with pytest.raises(QuotaExceeded):  # full: before anything is read
                await upload(files, "a", 1)
            await files.delete(first, "a")
            # Ten uploads at once, each of which fits alone: no more are stored than fit together.
            done = await asyncio.gather(
                *(upload(files, "a", 200) for _ in range(10)), return_exceptions=True
            )
            assert sum(isinstance(one, str) for one in done) == 3
            assert all(isinstance(one, str | QuotaExceeded) for one in done)
            # What a batch writes is never refused.
            async with files.upload("a", purpose="batch_output", max_bytes=5000) as made:
                await made.write(b"x" * 500)
        finally:
            await database.dispose()

    asyncio.run(run())
    stored = jobs.execute(
        text("SELECT sum(bytes) AS n FROM files WHERE tenant = 'a' AND status = 'ready'")
    )
    assert stored[0].n == QUOTA
    assert (
        jobs.execute(
            text(
                "SELECT count(*) AS n FROM file_chunks c JOIN files f ON f.id = c.file_id "
                "WHERE f.status <> 'ready' AND f.purpose = 'batch'"
            )
        )[0].n
        == 0
    )
