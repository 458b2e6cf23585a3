"""The waiting room of the sync endpoints: order, patience, clients that leave, a bound."""

from __future__ import annotations

import asyncio
import time

import pytest
from fastapi import Request

from api import backpressure
from api.backpressure import ClientLeft, Visit, WaitingRoom, patience_seconds
from shared.errors import Overloaded, TooManyRequests
from shared.metrics import REQUESTS_WAITING


class Client:
    """A connection that can be closed."""

    def __init__(self, **headers: str) -> None:
        self.gone = asyncio.Event()
        raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": raw, "query_string": b""}
        self.request = Request(scope, self._receive)

    async def _receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def visit(self, *, longest: float = 60.0, stopping: asyncio.Event | None = None) -> Visit:
        return Visit(self.request, stopping or asyncio.Event(), longest=longest)


class Limit:
    """Lets in as many as there is room for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.admitted: list[str] = []
        self.asked = 0

    async def enter(self, name: str) -> str:
        self.asked += 1
        if self.room <= 0:
            raise TooManyRequests("full", retry_after_seconds=7)
        self.room -= 1
        self.admitted.append(name)
        return name


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpressure, "POLL_SECONDS", 0.005)


async def until(check: object) -> None:
    async with asyncio.timeout(10):
        while not check():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_those_who_wait_come_in_in_the_order_of_their_arrival() -> None:
    limit, room, clients = Limit(1), WaitingRoom(40), {name: Client() for name in "abcd"}
    entering = []
    for name, client in clients.items():
        entering.append(
            asyncio.ensure_future(
                room.admit("key", client.visit(), lambda name=name: limit.enter(name))  # type: ignore[misc]
            )
        )
        await asyncio.sleep(0)
    await until(lambda: REQUESTS_WAITING._value.get() == 3)
    assert limit.admitted == ["a"]
    clients["c"].gone.set()  # its place is free for whoever is behind
    with pytest.raises(ClientLeft):
        await entering[2]
    limit.room = 5
    assert [await entering[n] for n in (0, 1, 3)] == ["a", "b", "d"] == limit.admitted
    assert REQUESTS_WAITING._value.get() == 0
    assert (
        await room.admit("key", Client().visit(), lambda: limit.enter("e")) == "e"
    )  # the line is gone again


async def test_who_comes_later_does_not_overtake() -> None:
    limit, room = Limit(0), WaitingRoom(40)
    first = asyncio.ensure_future(room.admit("key", Client().visit(), lambda: limit.enter("first")))
    await until(lambda: limit.asked)
    limit.room = 1
    second = asyncio.ensure_future(
        room.admit("key", Client().visit(), lambda: limit.enter("second"))
    )
    assert await first == "first"
    limit.room = 1
    assert await second == "second"


async def test_one_line_does_not_hold_up_another() -> None:
    full, free, room = Limit(0), Limit(1), WaitingRoom(40)
    waiting = asyncio.ensure_future(room.admit("full", Client().visit(), lambda: full.enter("x")))
    await until(lambda: full.asked)
    assert await room.admit("free", Client().visit(), lambda: free.enter("y")) == "y"
    waiting.cancel()


async def test_patience_ends_with_the_limits_own_answer() -> None:
    limit, room = Limit(0), WaitingRoom(40)
    with pytest.raises(TooManyRequests) as refused:
        await room.admit("key", Client().visit(longest=0.05), lambda: limit.enter("x"))
    assert (refused.value.message, refused.value.retry_after_seconds) == ("full", 7)
    assert limit.asked > 2
    assert REQUESTS_WAITING._value.get() == 0


async def test_only_so_many_wait() -> None:
    limit, room = Limit(0), WaitingRoom(1)
    waiting = asyncio.ensure_future(room.admit("a", Client().visit(), lambda: limit.enter("x")))
    await until(lambda: limit.asked)
    for line in ("a", "b"):
        with pytest.raises(TooManyRequests):
            await room.admit(line, Client().visit(), lambda: limit.enter("y"))
    waiting.cancel()


async def test_a_stopping_process_sends_them_elsewhere() -> None:
    limit, room, stopping = Limit(0), WaitingRoom(40), asyncio.Event()
    waiting = asyncio.ensure_future(
        room.admit("a", Client().visit(stopping=stopping), lambda: limit.enter("x"))
    )
    await until(lambda: limit.asked)
    stopping.set()
    with pytest.raises(Overloaded):
        await waiting


async def test_a_try_that_began_is_not_cut_off() -> None:
    """Else a job would be stored that nobody waits for."""
    client, begun, go_on = Client(), asyncio.Event(), asyncio.Event()
    tries = 0

    async def store() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise TooManyRequests("full")
        begun.set()
        await go_on.wait()
        return "stored"

    waiting = asyncio.ensure_future(WaitingRoom(40).admit("a", client.visit(longest=0.2), store))
    await begun.wait()
    client.gone.set()
    await asyncio.sleep(0.25)
    go_on.set()
    assert await waiting == "stored"


def test_a_clients_patience() -> None:
    def of(**headers: str) -> float:
        return patience_seconds(Client(**headers).request, 290)

    assert of() == 290
    assert of(x_stainless_read_timeout="600") == 290
    assert of(x_stainless_read_timeout="60") == 59
    assert of(x_stainless_read_timeout="0.5") == 0
    for odd in ("", "x", "nan", "-1", "None", "inf"):
        assert of(x_stainless_read_timeout=odd) == 290
    visit = Visit(Client(x_stainless_read_timeout="60").request, asyncio.Event(), longest=290)
    assert visit.waits_until - time.monotonic() < 60 < 200 < visit.remaining_seconds


async def test_a_key_leaves_room_for_others() -> None:
    """A line has a quarter of the places and of the bytes; the first of another one finds room."""
    full, room, clients = Limit(0), WaitingRoom(8, most_bytes=400), [Client() for _ in range(6)]

    def enter(line: str, client: Client, size: int) -> asyncio.Future[str]:
        visit = Visit(client.request, asyncio.Event(), longest=60.0, size=size)
        return asyncio.ensure_future(room.admit(line, visit, lambda: full.enter(line)))

    greedy = [enter("greedy", client, 10) for client in clients[:3]]
    await until(lambda: greedy[2].done())
    assert (
        isinstance(greedy[2].exception(), TooManyRequests)
        and not greedy[0].done()
        and not greedy[1].done()
    )
    large = [enter("large", client, 90) for client in clients[3:5]]
    await until(lambda: large[1].done())
    assert isinstance(large[1].exception(), TooManyRequests) and not large[0].done()
    too_large = enter("other", clients[5], 300)  # no room for it in all
    await until(too_large.done)
    assert isinstance(too_large.exception(), TooManyRequests)
    for task in (*greedy, *large):
        task.cancel()
    await asyncio.gather(*greedy, *large, return_exceptions=True)
    alone = enter("other", clients[5], 1000)  # nobody else waits
    await asyncio.sleep(0.02)
    assert not alone.done()
    alone.cancel()
