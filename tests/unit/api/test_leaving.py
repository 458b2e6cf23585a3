"""A stream of a job: who leaves it, and who does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from api.openai.leaving import StayingStream


class Staying:
    left = False

    def leave(self) -> None:
        self.left = True


async def run(
    events: AsyncIterator[bytes], *, client_leaves: bool = False, over: bool = False
) -> Staying:
    staying = Staying()
    waiting: list[str] = []
    waiter = SimpleNamespace(register=waiting.append, forget=waiting.remove)
    context: Any = SimpleNamespace(stopping=asyncio.Event(), waiter=waiter)
    stream = StayingStream(context, "job_1", events, staying)  # type: ignore[arg-type]  # what a Stay is asked for here
    stream.over = over

    async def send(message: Any) -> None:
        if client_leaves and message["type"] == "http.response.body":
            raise OSError("the connection is closed")

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with suppress(Exception):  # what the server logs
        assert waiting == ["job_1"]  # whoever follows a job waits for it
        await stream(scope, receive, send)
    assert waiting == []
    return staying


async def some(*, then: BaseException | None = None) -> AsyncIterator[bytes]:
    yield b"data: 1"
    if then is not None:
        raise then


async def test_a_client_that_leaves_leaves_the_job() -> None:
    assert (await run(some(), client_leaves=True)).left


async def test_an_end_leaves_nothing() -> None:
    assert not (await run(some(), over=True)).left


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ConnectionRefusedError("the database is away")]
)
async def test_an_error_of_ours_is_no_client_that_left(error: Exception) -> None:
    assert not (await run(some(then=error))).left
