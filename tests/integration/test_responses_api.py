"""The Responses API with the unmodified `openai` SDK: wait, stream, background, resume, cancel,
delete, go on, structured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.integration.conftest import Served, eventually

pytestmark = pytest.mark.integration

STORY = "Tom has 5 apples, gets 3 more and loses 2. How many apples are left?"
STORY_ANSWER = "5 + 3 = 8, 8 - 2 = 6. Answer: 6"
LONG: Any = {
    "max_output_tokens": 400,
    "extra_body": {"ignore_eos": True, "diffusion": {"block_length": 400}},
}

SOME: Any = {"max_output_tokens": 120, "extra_body": {"ignore_eos": True}}


class Basket(BaseModel):
    fruit: str
    count: int


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="anything", max_retries=0, timeout=60
    ) as client:
        yield client


def test_create_and_retrieve(client: openai.OpenAI, served: Served) -> None:
    made = client.responses.create(
        model="vdiff-tiny",
        input=STORY,
        metadata={"k": "v"},
        temperature=0.5,
        top_p=0.9,
        user="u",
        max_output_tokens=40,
    )
    assert (made.status, made.output_text, made.error) == ("completed", STORY_ANSWER, None)
    assert (made.metadata, made.temperature, made.top_p, made.max_output_tokens) == (
        {"k": "v"},
        0.5,
        0.9,
        40,
    )
    assert (
        made.usage is not None
        and made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    )
    assert client.responses.retrieve(made.id) == made
    job = served.client.get(f"/v1/jobs/job_{made.id.removeprefix('resp_')}").json()
    assert (job["endpoint"], job["priority"], job["metadata"]) == (
        "/v1/responses",
        "interactive",
        {"k": "v"},
    )
    assert job["usage"] == {
        "prompt_tokens": made.usage.input_tokens,
        "completion_tokens": made.usage.output_tokens,
        "total_tokens": made.usage.total_tokens,
    }


def test_messages_instructions_and_log_probabilities(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model="vdiff-tiny",
        instructions="Be short.",
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "What is 17 + 25?"}]}],
    )
    assert made.output_text == "42" and made.instructions == "Be short."
    [item] = made.output
    assert (
        item.type == "message"
        and item.content[0].type == "output_text"
        and item.content[0].logprobs is not None
    )
    assert [
        "".join(t.token for t in item.content[0].logprobs),
        len(item.content[0].logprobs[0].top_logprobs),
    ] == [
        "42",
        2,
    ]
    cut = client.responses.create(model="vdiff-tiny", input=STORY, max_output_tokens=4)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_the_events_that_the_sdk_knows(client: openai.OpenAI) -> None:
    with client.responses.stream(model="vdiff-tiny", input=STORY) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds[-5:-1] == [
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert (
        final.output_text
        == "".join(e.delta for e in events if e.type == "response.output_text.delta")
        == STORY_ANSWER
    )
    assert kinds.count("response.output_text.delta") > 1
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


def test_background_is_polled_and_its_stream_resumed(client: openai.OpenAI) -> None:
    made = client.responses.create(model="vdiff-tiny", input=STORY, background=True)
    assert made.status in ("queued", "in_progress", "completed") and made.background
    done = eventually(
        lambda: (r := client.responses.retrieve(made.id)).status == "completed" and r,
        what="the response",
    )
    assert done.output_text == STORY_ANSWER
    whole = list(client.responses.retrieve(made.id, stream=True))
    for event in whole:
        rest = list(
            client.responses.retrieve(made.id, stream=True, starting_after=event.sequence_number)
        )
        assert rest == whole[whole.index(event) + 1 :]
    with client.responses.stream(response_id=made.id, starting_after=6) as stream:
        assert stream.get_final_response().output_text == STORY_ANSWER


def test_who_leaves_a_background_stream_may_come_back(client: openai.OpenAI) -> None:
    text, last = "", 0
    with client.responses.create(
        model="vdiff-tiny", input=STORY, background=True, stream=True, **SOME
    ) as stream:
        for event in stream:
            last = event.sequence_number
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                text += event.delta
                break
    for event in client.responses.retrieve(response_id, stream=True, starting_after=last):
        if event.type == "response.output_text.delta":
            text += event.delta
    found = client.responses.retrieve(response_id)
    assert (found.status, found.output_text) == ("incomplete", text)


def test_cancel_and_delete(client: openai.OpenAI) -> None:
    more: Any = {**LONG, "extra_body": {**LONG["extra_body"], "seed": 4}}
    running = client.responses.create(model="vdiff-tiny", input="Once", background=True, **more)
    with pytest.raises(openai.ConflictError):
        client.responses.delete(running.id)
    assert client.responses.cancel(running.id).status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    client.responses.delete(running.id)
    for wrong in (running.id, "resp_nope", "job_" + running.id[5:]):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(wrong)


def test_a_conversation_goes_on(client: openai.OpenAI, served: Served) -> None:
    first = client.responses.create(
        model="vdiff-tiny", input="What is 17 + 25?", instructions="Not carried over."
    )
    second = client.responses.create(
        model="vdiff-tiny", input="What is 2 + 3?", previous_response_id=first.id
    )
    written = client.responses.create(
        model="vdiff-tiny",
        input=[
            {"role": "user", "content": "What is 17 + 25?"},
            *first.output,  # type: ignore[list-item]
            {"role": "user", "content": "What is 2 + 3?"},
        ],
    )
    assert second.usage is not None and written.usage is not None
    assert second.usage.input_tokens == written.usage.input_tokens
    third = client.responses.create(
        model="vdiff-tiny", input="And now?", previous_response_id=second.id
    )
    assert third.usage is not None and third.usage.input_tokens > second.usage.input_tokens
    client.responses.delete(first.id)
    body = {"model": "vdiff-tiny", "input": "x", "previous_response_id": first.id}
    for made in (
        served.client.post("/v1/responses", json=body),
        served.client.post("/v1/jobs", json={"endpoint": "/v1/responses", "body": body}),
    ):
        assert (made.status_code, made.json()["error"]["code"]) == (
            400,
            "previous_response_not_found",
        )


def test_what_was_asked_can_be_listed(client: openai.OpenAI, served: Served) -> None:
    first = client.responses.create(
        model="vdiff-tiny", input="What is 17 + 25?", max_output_tokens=8
    )
    asked: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is 2 + 3?"}]},
        *first.output,
        {"role": "user", "content": "And now?"},
    ]
    made = client.responses.create(
        model="vdiff-tiny",
        input=asked,
        previous_response_id=first.id,
        instructions="Be short.",
        max_output_tokens=8,
    )
    told = [
        (item.role, item.content[0].text)  # type: ignore[index, union-attr]
        for item in client.responses.input_items.list(made.id, order="asc")
    ]
    assert told == [("user", "What is 2 + 3?"), ("assistant", "42"), ("user", "And now?")]
    newest = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in newest.data] == ["And now?", "42"] and newest.has_more  # type: ignore[union-attr]
    assert len(list(newest)) == 3  # the SDK follows `after`
    (only,) = client.responses.input_items.list(first.id)
    assert (only.type, only.content[0].text) == ("message", "What is 17 + 25?")  # type: ignore[union-attr]
    path = f"/v1/responses/{made.id}/input_items"
    for query, param in (
        ("after=x", "after"),
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("include=x", "include"),
    ):
        answer = served.client.get(f"{path}?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    client.responses.delete(made.id)
    assert served.client.get(path).status_code in (404, 410)


def test_what_is_not_stored_is_not_found(client: openai.OpenAI) -> None:
    made = client.responses.create(model="vdiff-tiny", input="What is 17 + 25?", store=False)
    assert made.output_text == "42"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_structured(client: openai.OpenAI) -> None:
    made = client.responses.parse(
        model="vdiff-tiny", input="Write", text_format=Basket, max_output_tokens=64
    )
    assert isinstance(made.output_parsed, Basket)
    bad: Any = {
        "format": {"type": "json_schema", "name": "n", "schema": {"type": "object", "not": {}}}
    }
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(model="vdiff-tiny", input="Write", text=bad)
    assert wrong.value.param == "text.format.schema.not"


def test_it_is_a_job_and_a_line_of_a_batch(client: openai.OpenAI, served: Served) -> None:
    body = {"model": "vdiff-tiny", "input": STORY}
    job = {"endpoint": "/v1/responses", "body": body}
    done = served.client.post("/v1/jobs", json=job, headers={"Prefer": "wait=30"}).json()
    assert done["result"]["object"] == "response"
    assert client.responses.retrieve(done["result"]["id"]).output_text == STORY_ANSWER
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"
    )
    batch = eventually(
        lambda: (b := client.batches.retrieve(batch.id)).status == "completed" and b,
        seconds=40,
        what="batch",
    )
    assert batch.output_file_id is not None
    made = json.loads(client.files.content(batch.output_file_id).text)["response"]["body"]
    assert made["output"][0]["content"][0]["text"] == STORY_ANSWER


def test_who_leaves_while_it_waits_cancels(served: Served) -> None:
    body = {
        "model": "vdiff-tiny",
        "input": "Leave",
        "stream": True,
        "max_output_tokens": 400,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{served.url}/v1/responses", json=body, timeout=120) as answer:
        job_id = answer.headers["x-job-id"]
        next(answer.iter_lines())
    status = eventually(
        lambda: (
            (s := served.client.get(f"/v1/jobs/{job_id}").json()["status"])
            not in ("queued", "running")
            and s
        )
    )
    assert status == "cancelled"
