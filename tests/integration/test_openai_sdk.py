"""The `openai` SDK, unmodified, sync and async, streaming and not, over real HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.integration.conftest import ApiProcess, Served, eventually

pytestmark = pytest.mark.integration

QUESTION: Any = [{"role": "user", "content": "What is 17 + 25?"}]
STORY: Any = [
    {
        "role": "user",
        "content": "Tom has 5 apples, gets 3 more and loses 2. How many apples are left?",
    },
]
STORY_ANSWER = "5 + 3 = 8, 8 - 2 = 6. Answer: 6"
LONG: Any = {
    "max_tokens": 480,
    "extra_body": {"ignore_eos": True, "diffusion": {"block_length": 480}},
}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="anything", max_retries=0, timeout=60
    ) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="vdiff-tiny", messages=QUESTION)
    assert answer.choices[0].message.content == "42"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2
    assert answer.object == "chat.completion"
    assert answer.model_extra is not None
    assert answer.model_extra["vdiff"]["forwards"] > 0
    assert answer.model_extra["vdiff"]["job_id"].startswith("job_")


def test_the_job_behind_an_answer(client: openai.OpenAI, served: Served) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="vdiff-tiny", messages=QUESTION, n=2, seed=3
    )
    job = served.client.get(f"/v1/jobs/{raw.headers['x-job-id']}").json()
    assert (job["status"], job["priority"], len(job["result"]["choices"])) == (
        "succeeded",
        "interactive",
        2,
    )
    assert raw.headers["x-request-id"]


def test_completions_with_diffusion_parameters(client: openai.OpenAI) -> None:
    prompt = "<|user|>What is 17 + 25?<|eot_id|><|assistant|>"
    slow = client.completions.create(model="vdiff-tiny", prompt=prompt, max_tokens=16)
    fast = client.completions.create(
        model="vdiff-tiny",
        prompt=prompt,
        max_tokens=16,
        extra_body={"diffusion": {"algorithm": "threshold", "threshold": 0.9}},
    )
    assert slow.choices[0].text == fast.choices[0].text == "42"
    assert fast.model_extra["vdiff"]["forwards"] < slow.model_extra["vdiff"]["forwards"]  # type: ignore[index]


def test_several_prompts_are_answered_as_if_each_were_alone(
    client: openai.OpenAI, served: Served
) -> None:
    prompts = [
        f"<|user|>What is {a} + 25?<|eot_id|><|assistant|>" for a in range(10, 22)
    ]  # more than there are slots
    asked: Any = {"model": "vdiff-tiny", "max_tokens": 16, "temperature": 0.8, "seed": 7, "n": 2}
    together = client.completions.create(prompt=prompts, **asked)
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]
    assert [c.index for c in together.choices] == list(range(24))
    assert [c.text for c in together.choices] == [c.text for one in alone for c in one.choices]
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(together.usage, name) == sum(getattr(one.usage, name) for one in alone)
    made = served.client.get(f"/v1/jobs/{together.model_extra['vdiff']['job_id']}").json()
    assert made["status"] == "succeeded"
    assert made["diffusion"]["forwards"] == sum(
        one.model_extra["vdiff"]["forwards"] for one in alone
    )
    replayed = served.client.post(f"/v1/jobs/{made['id']}/replay").json()
    assert replayed["id"] != made["id"]
    eventually(
        lambda: served.client.get(f"/v1/jobs/{replayed['id']}").json()["done"], what="replayed"
    )
    again = served.client.get(f"/v1/jobs/{replayed['id']}").json()["result"]["choices"]
    assert [c["text"] for c in again] == [c.text for c in together.choices]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(prompt=prompts, stream=True, **asked)
    assert wrong.value.param == "stream"


def test_stop_strings(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="vdiff-tiny", messages=STORY, stop=[" 8 -", "Answer"]
    )
    assert answer.choices[0].message.content == STORY_ANSWER.partition(" 8 -")[0]
    assert answer.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model="vdiff-tiny", messages=STORY, max_tokens=4)
    assert cut.choices[0].finish_reason == "length"


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="vdiff-tiny", messages=STORY, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    assert "".join(pieces) == STORY_ANSWER
    assert len(pieces) > 1  # it comes bit by bit
    assert [
        c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason
    ] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_completion_stream_of_several_choices(client: openai.OpenAI) -> None:
    body: Any = {
        "model": "vdiff-tiny",
        "prompt": "<|user|>What is 2 + 3?<|eot_id|><|assistant|>",
        "n": 3,
        "seed": 5,
    }
    body.update(temperature=1.0, max_tokens=24, extra_body={"ignore_eos": True})
    texts = ["", "", ""]
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    whole = client.completions.create(**body)
    assert texts == [c.text for c in whole.choices]


def test_visualize_replaces_the_text(client: openai.OpenAI) -> None:
    seen = []
    stream = client.chat.completions.create(
        model="vdiff-tiny",
        messages=STORY,
        stream=True,
        extra_body={"diffusion": {"visualize": True}},
    )
    for chunk in stream:
        extras = (chunk.model_extra or {}).get("vdiff", {})
        if extras.get("replace"):
            seen.append((chunk.choices[0].delta.content, extras))
    assert any("\u2591" in text for text, _ in seen[:-1])
    assert all(text.startswith(extras["committed"]) for text, extras in seen)
    assert seen[-1][0] == STORY_ANSWER
    assert [extras["diffusing"] for _, extras in seen] == [True] * (len(seen) - 1) + [False]


def test_async_client(served: Served) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=60
        ) as client:

            async def one(a: int) -> str:
                messages: Any = [{"role": "user", "content": f"What is {a} + 10?"}]
                if a % 2:
                    answer = await client.chat.completions.create(
                        model="vdiff-tiny", messages=messages
                    )
                    return str(answer.choices[0].message.content)
                stream = await client.chat.completions.create(
                    model="vdiff-tiny", messages=messages, stream=True
                )
                return "".join(
                    [c.choices[0].delta.content or "" async for c in stream if c.choices]
                )

            return await asyncio.gather(*(one(a) for a in range(1, 13)))

    assert asyncio.run(main()) == [str(a + 10) for a in range(1, 13)]


def test_models(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == "vdiff-tiny"
    assert client.models.retrieve("vdiff-tiny").owned_by == "vdiff"


def test_errors_are_the_sdks_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="vdiff-tiny", messages=QUESTION, max_tokens=0)
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-0", messages=QUESTION)
    assert missing.value.code == "model_not_found"


def newest_job(served: Served, **params: str) -> Any:
    return served.client.get("/v1/jobs", params={"limit": 1, **params}).json()["data"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(served: Served, stream: bool) -> None:
    tag = f"left-{time.time_ns()}"
    body = {
        "model": "vdiff-tiny",
        "messages": QUESTION,
        "metadata": {"tag": tag},
        "stream": stream,
        "max_tokens": 480,
        "ignore_eos": True,
        "diffusion": {"block_length": 480},
    }
    with (
        pytest.raises(httpx.TimeoutException),
        httpx.Client(base_url=served.url, timeout=0.5) as client,
    ):
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert answer.headers["x-job-id"]
                raise httpx.ReadTimeout("gone")
        client.post("/v1/chat/completions", json=body)
    eventually(
        lambda: newest_job(served, **{"metadata[tag]": tag})["status"] == "cancelled",
        what="cancelled",
    )


def test_a_client_that_leaves_with_a_key_does_not(served: Served) -> None:
    tag = f"kept-{time.time_ns()}"
    body = {
        "model": "vdiff-tiny",
        "messages": QUESTION,
        "metadata": {"tag": tag},
        "max_tokens": 300,
        "ignore_eos": True,
        "diffusion": {"block_length": 300},
    }
    with (
        pytest.raises(httpx.TimeoutException),
        httpx.Client(base_url=served.url, timeout=0.3) as client,
    ):
        client.post("/v1/chat/completions", json=body, headers={"idempotency-key": tag})
    eventually(
        lambda: newest_job(served, **{"metadata[tag]": tag})["status"] == "succeeded", seconds=60
    )
    answer = served.client.post("/v1/chat/completions", json=body, headers={"idempotency-key": tag})
    assert answer.json()["vdiff"]["job_id"] == newest_job(served, **{"metadata[tag]": tag})["id"]


def test_waiting_ends_with_504_and_the_jobs_url(served: Served, tmp_path: Any) -> None:
    api = ApiProcess(served.jobs, tmp_path / "api.log", sync_timeout_seconds=0.4)
    try:
        api.wait_ready()
        body = {
            "model": "vdiff-tiny",
            "messages": QUESTION,
            "max_tokens": 480,
            "ignore_eos": True,
            "diffusion": {"block_length": 480},
        }
        answer = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=120)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "wait_timeout")
        assert answer.headers["x-should-retry"] == "false"
        job = served.client.get(answer.headers["location"]).json()
        assert job["status"] in ("queued", "running")
        served.client.post(job["urls"]["cancel"])
        failed = httpx.post(
            f"{api.url}/v1/chat/completions", json={**body, "max_tokens": 0}, timeout=120
        )
        assert failed.status_code == 400
    finally:
        api.end()


def test_a_stopping_api_cancels_nobodys_job(served: Served, tmp_path: Any) -> None:
    api = ApiProcess(served.jobs, tmp_path / "api.log")
    try:
        api.wait_ready()
        body = {
            "model": "vdiff-tiny",
            "messages": QUESTION,
            "max_tokens": 480,
            "ignore_eos": True,
            "stream": True,
            "diffusion": {"block_length": 480},
        }
        with httpx.stream(
            "POST", f"{api.url}/v1/chat/completions", json=body, timeout=120
        ) as answer:
            api.process.terminate()
            said = "".join(answer.iter_text())
        assert api.process.wait(240) == 0
        assert "the server is stopping" in said
        job = served.client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()
        assert not job["cancel_requested"]
        served.client.post(job["urls"]["cancel"])
    finally:
        api.end()


def test_the_sdks_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="vdiff-tiny", messages=STORY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == STORY_ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    odd: Any = [
        {"role": "user", "content": "Something that it never learned?"}
    ]  # so that chance has a say

    def say(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="vdiff-tiny",
            messages=odd,
            seed=seed,
            n=2,
            temperature=2,
            max_tokens=64,
            extra_body={"ignore_eos": True},
        )
        return [choice.message.content for choice in answer.choices]

    first = say(5)
    assert say(5) == first
    assert say(6) != first
    assert first[0] != first[1]  # the answers of one request are not copies


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_somebody_cancels_ends_the_call(served: Served, stream: bool) -> None:
    tag = f"cancelled-{time.time_ns()}"

    def cancel() -> None:
        def begun() -> Any:
            jobs = served.client.get(
                "/v1/jobs", params={"metadata[tag]": tag, "status": "running"}
            ).json()["data"]
            return jobs and jobs[0]

        served.client.post(eventually(begun, what="running")["urls"]["cancel"])

    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="x", max_retries=2, timeout=60
    ) as client:
        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(openai.APIError) as ended:
            answer = client.chat.completions.create(
                model="vdiff-tiny", messages=QUESTION, metadata={"tag": tag}, stream=stream, **LONG
            )
            for _ in answer:  # an error inside a stream is raised as it is read
                pass
        thread.join()
    assert ended.value.code == "cancelled"
    everything = served.client.get("/v1/jobs", params={"metadata[tag]": tag}).json()["data"]
    assert [job["status"] for job in everything] == ["cancelled"]  # the SDK did not try again


def test_what_is_not_there_names_what_is(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="vdiff-tiny", input="x")
    assert "`available`" in str(missing.value)
    assert "POST /v1/chat/completions" in missing.value.response.json()["available"]
    assert missing.value.code == "not_found"
    for method, path in (
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/assistants"),
        ("GET", "/nothing"),
    ):
        answer = served.client.request(method, path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert {"POST /v1/completions", "GET /v1/batches/{batch_id}", "GET /health"} <= set(
            answer.json()["available"]
        )
    assert (
        served.client.get("/v1/embeddings")
        .json()["error"]["message"]
        .startswith("GET /v1/embeddings is not served")
    )
    no_prefix = served.client.post("/chat/completions", json={})
    assert "did you mean /v1/chat/completions?" in no_prefix.json()["detail"]
    assert "/docs" in no_prefix.json()["detail"] and served.client.get("/docs").status_code == 200
    wrong = served.client.put("/v1/jobs")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")


def test_logprobs_of_both_endpoints(served: Served, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=served.model, messages=QUESTION, logprobs=True, top_logprobs=2
    )
    found = chat.choices[0].logprobs
    assert found is not None and found.content is not None
    assert "".join(t.token for t in found.content) == chat.choices[0].message.content == "42"
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in found.content)
    stream = client.chat.completions.create(
        model=served.model, messages=QUESTION, logprobs=True, stream=True
    )
    last = [c.choices[0] for c in stream if c.choices and c.choices[0].finish_reason][-1]
    assert last.logprobs is not None and last.logprobs.content is not None
    assert [t.token for t in last.logprobs.content] == [t.token for t in found.content]
    prompt = "<|user|>What is 17 + 25?<|eot_id|><|assistant|>"
    plain = (
        client.completions.create(model=served.model, prompt=prompt, logprobs=1).choices[0].logprobs
    )
    assert plain is not None and plain.tokens is not None
    assert "".join(plain.tokens) == "42"


def test_apd_with_the_bundled_verifier(served: Served, client: openai.OpenAI) -> None:
    diffusion = {"algorithm": "apd", "apd": {"mixture_weight": 0.5, "max_lookahead": 8}}
    chat = client.chat.completions.create(
        model=served.model, messages=STORY, extra_body={"diffusion": diffusion}
    )
    assert chat.choices[0].message.content == STORY_ANSWER
    job = served.client.get(f"/v1/jobs/{chat.model_extra['vdiff']['job_id']}").json()  # type: ignore[index]
    assert 0 < job["diffusion"]["acceptance_rate"] <= 1
    assert job["diffusion"]["mixture_weight"] == 0.5
