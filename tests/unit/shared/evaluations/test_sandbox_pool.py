"""Slots of sandboxes: bounded on the whole host, shared fairly, freed by a process that dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from shared.evaluations import sandbox_pool
from shared.evaluations.sandbox_pool import SandboxesBusy, SandboxPool

HOLDER = """
import asyncio, sys
from pathlib import Path
from shared.evaluations.sandbox_pool import SandboxPool
async def main():
    async with SandboxPool(1, memory_mb=64, folder=Path(sys.argv[1])).slot("other"):
        print("held", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def pool_of(tmp_path: Path, slots: int) -> SandboxPool:
    return SandboxPool(slots, memory_mb=64, folder=tmp_path / "slots")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_pool, "WAIT_SECONDS", 0.0)


async def test_slots_are_bounded_in_all_pools_of_a_folder(tmp_path: Path) -> None:
    first, second = pool_of(tmp_path, 2), pool_of(tmp_path, 2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(first.slot("a"))
        await stack.enter_async_context(second.slot("b"))
        with pytest.raises(SandboxesBusy):
            async with first.slot("c", is_request=True):
                raise AssertionError("there is no third slot")
    async with first.slot("c", is_request=True):
        pass


async def test_one_tenant_leaves_a_slot_to_the_others(tmp_path: Path) -> None:
    pool, elsewhere = pool_of(tmp_path, 3), pool_of(tmp_path, 3)
    async with pool.slot("a"), elsewhere.slot("a"):
        with pytest.raises(SandboxesBusy):
            async with pool.slot("a", is_request=True):
                raise AssertionError("the last slot is for another tenant")
        async with pool.slot("b", is_request=True):
            pass


async def test_what_waits_gets_the_slot_that_becomes_free(tmp_path: Path) -> None:
    pool, done = pool_of(tmp_path, 1), []

    async def use(name: str) -> None:
        async with pool.slot(name):
            done.append(name)

    async with pool.slot("a"):
        waiting = [asyncio.create_task(use(f"w{i}")) for i in range(5)]
        await asyncio.sleep(0)
        assert done == []
    await asyncio.gather(*waiting)
    assert sorted(done) == [f"w{i}" for i in range(5)]


async def test_requests_that_wait_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_pool, "WAIT_SECONDS", 60.0)
    monkeypatch.setattr(sandbox_pool, "WAITING_MAX", 2)
    pool = pool_of(tmp_path, 1)

    async def use() -> None:
        async with pool.slot("a", is_request=True):
            pass

    async with pool.slot("b"):
        waiting = [asyncio.create_task(use()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(SandboxesBusy, match="too many"):
            await use()
    await asyncio.gather(*waiting)
    await use()


async def test_a_process_that_is_killed_frees_its_slot(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1)
    root = Path(__file__).resolve().parents[4]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "slots")], cwd=root, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(SandboxesBusy):
            async with pool.slot("a", is_request=True):
                raise AssertionError("another process holds the slot")
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    async with pool.slot("a", is_request=True):
        pass


async def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(SandboxesBusy, match="belongs to another user"):
        async with pool_of(tmp_path, 1).slot("a"):
            raise AssertionError("others may write there")
