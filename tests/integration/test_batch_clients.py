"""Batches as other programs use them: inspect-ai's calls, and the dispatchers that hear of new
lines.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from openai import OpenAI
from openai.types.chat import ChatCompletion

from shared.queue.window import DISPATCH_CHANNEL
from tests.integration.conftest import Served
from tests.integration.test_batches import OVER, jsonl, line, over, start, sums

pytestmark = pytest.mark.integration


def test_stored_lines_wake_the_dispatchers(served: Served) -> None:
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client,
        redis.Redis.from_url(served.jobs.redis_url) as other,
        other.pubsub() as channel,
    ):
        channel.subscribe(DISPATCH_CHANNEL)
        channel.get_message(timeout=5)  # that it is subscribed
        batch = start(client, sums(1))
        told = channel.get_message(ignore_subscribe_messages=True, timeout=20)
        assert told is not None and told["data"] == served.model.encode()
        over(client, batch.id)


async def test_a_batch_as_inspect_ai_makes_it(served: Served, tmp_path: Path) -> None:
    """`inspect_ai/model/_providers/_openai_batch.py` 0.3.285, its calls and how it reads what comes
    back.
    """

    async def ended(lines: list[dict[str, Any]]) -> Any:
        source = tmp_path / "requests.jsonl"
        source.write_bytes(jsonl(lines))
        with source.open("rb") as file:
            uploaded = await client.files.create(file=file, purpose="batch", extra_headers=None)
        batch = await client.batches.create(
            input_file_id=uploaded.id,
            completion_window="24h",
            endpoint="/v1/chat/completions",
            extra_headers=None,
        )
        for _ in range(300):
            batch = await client.batches.retrieve(batch.id)
            if batch.status in OVER:
                return batch
            await asyncio.sleep(0.2)
        raise AssertionError("the batch does not end")

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        batch = await ended(sums(3))
        read = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                content = await (await client.files.content(file_id)).aread()
                for raw in content.decode().splitlines():
                    result = json.loads(raw)
                    assert result["error"] is None
                    read[result["custom_id"]] = ChatCompletion.model_validate(
                        result["response"]["body"]
                    )
        assert {k: v.choices[0].message.content for k, v in read.items()} == {
            "sum-1": "6",
            "sum-2": "7",
            "sum-3": "8",
        }
        rejected = await ended([line(f"bad-{i}", max_tokens=0) for i in range(2)])
        assert rejected.status == "failed" and rejected.output_file_id is None
        assert [e.param for e in rejected.errors.data] == [
            "body.max_tokens"
        ] * 2  # one for each request
