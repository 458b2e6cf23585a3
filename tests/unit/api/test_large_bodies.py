"""Large JSON bodies: parsed beside the event loop, one at a time; and bodies that do not say what
they are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api import dependencies, errors
from api.dependencies import PARSED_BESIDE_BYTES, JsonBody

LARGE = b'"' + b"x" * PARSED_BESIDE_BYTES + b'"'
JSON = {"content-type": "application/json"}


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return how many bodies are parsed at once, at most, and in which threads."""
    seen: dict[str, Any] = {"now": 0, "most": 0, "threads": set(), "gate": threading.Event()}
    real = dependencies.parse_json

    def parse(raw: bytes) -> Any:
        seen["now"] += 1
        seen["most"] = max(seen["most"], seen["now"])
        seen["threads"].add(threading.current_thread())
        if threading.current_thread() is not threading.main_thread():
            seen["gate"].wait(10)
        seen["now"] -= 1
        return real(raw)

    monkeypatch.setattr(dependencies, "parse_json", parse)
    yield seen


@pytest.fixture
async def client() -> Any:
    app = FastAPI()
    errors.install(app)

    @app.post("/echo")
    async def echo(body: JsonBody) -> Any:
        return len(body)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as made:
        yield made


async def test_large_bodies_wait_for_each_other_and_nobody_waits_for_them(
    client: httpx.AsyncClient, parses: dict[str, Any]
) -> None:
    large = [
        asyncio.create_task(client.post("/echo", content=LARGE, headers=JSON)) for _ in range(4)
    ]
    for _ in range(1000):
        if parses["now"]:
            break
        await asyncio.sleep(0.005)
    assert parses["now"] == 1  # one is being parsed, and does not end before the gate opens
    assert (await client.post("/echo", content=b'"small"', headers=JSON)).json() == 5
    parses["gate"].set()
    assert [answer.json() for answer in await asyncio.gather(*large)] == [PARSED_BESIDE_BYTES] * 4
    assert parses["most"] == 2  # a large one, and the small one beside it
    assert len(parses["threads"]) >= 2


async def test_a_body_without_a_content_type_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/echo", content=b'"x"')
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")
    assert "application/json" in answer.json()["error"]["message"]
    for kind in (
        "application/json",
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "application/problem+json",
    ):
        assert (
            await client.post("/echo", content=b'"x"', headers={"content-type": kind})
        ).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "json"):
        answer = await client.post("/echo", content=b'"x"', headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")
