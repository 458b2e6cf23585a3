"""Structured output and `logit_bias` through the unmodified `openai` SDK and jobs; schemas refused
at submission.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from shared.tokenizer import TokenizerWrapper
from tests.integration.conftest import Served
from vdiff import bundled

pytestmark = pytest.mark.integration

WORDS: Any = [{"role": "user", "content": "Write a JSON list of the words: apple river stone"}]


class Basket(BaseModel):
    fruit: str
    count: int


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="anything", max_retries=0, timeout=60
    ) as client:
        yield client


def words_format(**items: Any) -> Any:
    schema = {"type": "array", "items": {"type": "string", **items}, "minItems": 1, "maxItems": 4}
    return {
        "type": "json_schema",
        "json_schema": {"name": "words", "strict": True, "schema": schema},
    }


def test_the_sdk_parses_into_its_own_classes(client: openai.OpenAI) -> None:
    for algorithm in ("sequential", "threshold"):
        answer = client.chat.completions.parse(
            model="vdiff-tiny",
            messages=WORDS,
            response_format=Basket,
            max_tokens=64,
            n=2,
            temperature=1.0,
            extra_body={"diffusion": {"algorithm": algorithm}},
        )
        assert [type(choice.message.parsed) for choice in answer.choices] == [Basket, Basket]
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_stream_grows_into_valid_json(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="vdiff-tiny",
        messages=WORDS,
        response_format=words_format(enum=["apple", "river", "stone"]),
        stream=True,
    )
    pieces = [
        c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content
    ]
    assert len(pieces) > 1
    assert set(json.loads("".join(pieces))) <= {"apple", "river", "stone"}


def test_jobs_and_completions_take_it_and_say_when_they_closed_early(
    client: openai.OpenAI, served: Served
) -> None:
    body: dict[str, Any] = {
        "model": "vdiff-tiny",
        "prompt": "Once",
        "max_tokens": 8,
        "temperature": 1.5,
        "seed": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "text", "schema": {"type": "string", "minLength": 5}},
        },
    }
    job = {"endpoint": "/v1/completions", "body": body}
    done = served.client.post("/v1/jobs", json=job, headers={"Prefer": "wait=30"}).json()
    text = done["result"]["choices"][0]["text"]
    assert len(json.loads(text)) >= 5
    assert done["result"]["vdiff"].get("closed_early") == [0]
    format_ = body.pop("response_format")
    again: Any = {**body, "extra_body": {"response_format": format_}}
    assert client.completions.create(**again).choices[0].text == text


def test_logit_bias_bans(client: openai.OpenAI) -> None:
    usual = client.chat.completions.create(model="vdiff-tiny", messages=WORDS, logprobs=True)
    assert usual.choices[0].message.content == '["apple", "river", "stone"]'
    tokens = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL)).encode("apple")
    banned = client.chat.completions.create(
        model="vdiff-tiny", messages=WORDS, logit_bias={str(t): -100 for t in tokens}
    )
    assert "apple" not in (banned.choices[0].message.content or "")


def test_a_schema_that_cannot_be_enforced_is_refused_before_there_is_a_job(
    client: openai.OpenAI,
) -> None:
    for response_format, param in (
        (words_format(**{"not": {}}), "response_format.json_schema.schema.items.not"),
        (words_format(pattern="(?<!x)y"), "response_format.json_schema.schema"),
        ({"type": "grammar"}, "response_format.type"),
    ):
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(
                model="vdiff-tiny", messages=WORDS, response_format=response_format
            )
        assert wrong.value.param == param
