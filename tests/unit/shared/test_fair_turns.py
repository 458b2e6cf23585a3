"""Tenants take turns, however many things one of them has to do."""

from __future__ import annotations

import asyncio

from shared.fair_turns import FairTurns, LastServed


async def run_all(turns: FairTurns, tenants: list[str]) -> list[str]:
    """Every entry takes a turn; return the order in which they had it."""
    order: list[str] = []

    async def one(tenant: str) -> None:
        async with turns.turn(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(tenant) for tenant in tenants))
    return order


async def test_a_tenant_with_little_waits_for_one_turn_of_the_others() -> None:
    order = await run_all(FairTurns(1), ["a"] * 50 + ["b"] + ["c"] * 2)
    assert order.index("b") <= 3 and order.index("c") <= 3
    assert sorted(order) == sorted(["a"] * 50 + ["b"] + ["c"] * 2)


async def test_one_tenant_never_has_all_turns() -> None:
    turns, running, most = FairTurns(3), 0, 0

    async def one() -> None:
        nonlocal running, most
        async with turns.turn("a"):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(one() for _ in range(20)))
    assert most == 2
    async with turns.turn("a"), turns.turn("a"), turns.turn("b"):
        pass


async def test_whoever_gives_up_leaves_its_turn() -> None:
    turns = FairTurns(1)
    async with turns.turn("a"):
        waiting = [asyncio.create_task(run_all(turns, ["b"])) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
    assert await asyncio.gather(*waiting[1:]) == [["b"], ["b"]]
    assert await run_all(turns, ["c"]) == ["c"]


def test_the_tenants_that_were_served_longest_ago_come_first() -> None:
    served = LastServed(most=3)
    for tenant in ("a", "b", "a", "c", "d"):
        served.note(tenant)
    assert served.oldest_first() == ["a", "c", "d"]
