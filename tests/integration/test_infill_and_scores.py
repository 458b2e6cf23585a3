"""`/v1/infill` and `/v1/loglikelihood`: as calls, as jobs, as lines of a batch; the numbers are the
engine's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.integration.conftest import Served, eventually
from tests.integration.test_batches import over, upload
from vdiff import bundled
from worker.engine import SamplingParams, VDiffConfig, VDiffEngine

pytestmark = pytest.mark.integration

INFILL, LOGLIKELIHOOD = "/v1/infill", "/v1/loglikelihood"
ASKED = "<|user|>What is 17 + 25?<|eot_id|><|assistant|>"


@pytest.fixture(scope="module")
def engine() -> Iterator[VDiffEngine]:
    """The same model in this process."""
    with VDiffEngine(
        VDiffConfig(model=str(bundled.folder(bundled.DEFAULT_MODEL)), num_threads=1)
    ) as made:
        yield made


def infill(*parts: str | int, **more: Any) -> dict[str, Any]:
    return {
        "model": "vdiff-tiny",
        "parts": [p if isinstance(p, str) else {"hole": p} for p in parts],
        "temperature": 0,
        **more,
    }


def pair(context: str, continuation: str, **more: Any) -> dict[str, Any]:
    return {"model": "vdiff-tiny", "context": context, "continuation": continuation, **more}


def refused(served: Served, path: str, body: Any, param: str) -> str:
    """The message of the 400, which is the same for a call and for a job."""
    for url, sent in ((path, body), ("/v1/jobs", {"endpoint": path, "body": body})):
        answer = served.client.post(url, json=sent)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    return str(answer.json()["error"]["message"])


def test_infill_fills_what_the_engine_fills(served: Served, engine: VDiffEngine) -> None:
    parts = ("<|user|>What is 17 + ", 2, "?<|eot_id|><|assistant|>4", 1, "<|eot_id|>")
    answer = served.client.post(INFILL, json=infill(*parts))
    assert answer.status_code == 200, answer.text
    result, wanted = answer.json(), engine.infill(parts, SamplingParams(temperature=0.0))
    assert answer.headers["x-job-id"] == result["vdiff"]["job_id"]
    assert (result["object"], result["model"]) == ("infill", "vdiff-tiny")
    assert result["choices"][0]["holes"] == wanted.holes
    assert result["choices"][0]["text"] == wanted.text
    assert "?<|eot_id|><|assistant|>4" in wanted.text
    fixed = sum(len(engine.tokenizer.encode(p)) for p in parts if isinstance(p, str))
    assert result["usage"]["prompt_tokens"] == fixed
    assert 0 < result["usage"]["completion_tokens"] <= 5
    assert result["vdiff"]["forwards"] >= 1


def test_infill_as_a_job_has_progress_and_an_estimate(served: Served) -> None:
    body = infill(ASKED, 2, n=2, temperature=1.0, seed=3)
    estimate = served.client.post(
        "/v1/jobs/estimate", json={"endpoint": INFILL, "body": body}
    ).json()
    assert estimate["tokens"]["max_completion"] == 4
    job = served.client.post(
        "/v1/jobs", json={"endpoint": INFILL, "body": body}, headers={"prefer": "wait=30"}
    ).json()
    assert job["status"] == "succeeded"
    assert job["progress"]["tokens_committed"] == job["progress"]["tokens_total"] == 4
    assert [len(c["holes"]) for c in job["result"]["choices"]] == [1, 1]
    again = served.client.post(f"/v1/jobs/{job['id']}/replay", headers={"prefer": "wait=30"}).json()
    assert again["replay"]["same_text"] is True


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"parts": None}, "parts"),
        ({"parts": []}, "parts"),
        ({"parts": ["no hole"]}, "parts"),
        ({"parts": [{"hole": 0}]}, "parts[0].hole"),
        ({"parts": ["a", {"hole": 1, "x": 2}]}, "parts[1].x"),
        ({"parts": [1, {"hole": 1}]}, "parts[0]"),
        ({"parts": [{"hole": 513}]}, "parts[0].hole"),
        ({"parts": ["<|mdm_mask|>", {"hole": 1}]}, "parts[0]"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"diffusion": {"max_forwards": 3}}, "diffusion.max_forwards"),
        ({"temperature": 3}, "temperature"),
        ({"diffusion": {"algorithm": "apd"}}, "diffusion.algorithm"),
        ({"model": None}, "model"),
        ({"diffusion": {"block_length": 100}}, "diffusion.block_length"),
        ({"stream": True}, "stream"),
    ],
)
def test_infill_refuses_by_name(served: Served, wrong: dict[str, Any], param: str) -> None:
    message = refused(served, INFILL, {**infill("a ", 2, " b"), **wrong}, param)
    assert "max_tokens" not in message or param == "max_tokens"


def test_loglikelihoods_are_the_engines(served: Served, engine: VDiffEngine) -> None:
    context, right, wrong = (engine.tokenizer.encode(t) for t in (ASKED, "42", "57"))
    one = served.client.post(LOGLIKELIHOOD, json=pair(ASKED, "42", mc_num=64, seed=5)).json()
    wanted = engine.loglikelihood(context, right, mc_num=64, seed=5)
    (found,) = one["data"]
    assert found["loglikelihood"] == pytest.approx(wanted.value, abs=1e-4)
    assert found["standard_error"] == pytest.approx(wanted.standard_error, abs=1e-4)
    assert (found["tokens"], found["is_greedy"]) == (2, None)
    assert (one["vdiff"]["method"], one["vdiff"]["mc_num"], one["vdiff"]["forwards"]) == (
        "monte_carlo",
        64,
        64,
    )
    assert one["usage"] == {
        "prompt_tokens": len(context) + 2,
        "completion_tokens": 0,
        "total_tokens": len(context) + 2,
    }

    pairs = [{"context": ASKED, "continuation": text} for text in ("42", "57")]
    pairs.append({"context": context, "continuation": right})
    both = {"model": "vdiff-tiny", "pairs": pairs, "method": "chain_rule", "cfg_scale": 0.5}
    good, bad, by_ids = served.client.post(LOGLIKELIHOOD, json=both).json()["data"]
    chain = engine.loglikelihood(context, right, method="chain_rule", cfg_scale=0.5)
    assert (
        good["loglikelihood"]
        == pytest.approx(chain.value, abs=1e-4)
        == pytest.approx(by_ids["loglikelihood"])
    )
    assert math.fsum(good["token_logprobs"]) == pytest.approx(good["loglikelihood"])
    assert (good["is_greedy"], bad["is_greedy"]) == (True, False)
    assert good["loglikelihood"] > bad["loglikelihood"]
    assert wrong != right


def test_a_score_as_a_job_is_estimated_followed_and_cancelled(served: Served) -> None:
    body = pair(ASKED, "42", mc_num=1024, seed=1)
    estimate = served.client.post(
        "/v1/jobs/estimate", json={"endpoint": LOGLIKELIHOOD, "body": body}
    ).json()
    assert estimate["forwards"] == {"min": 1024, "max": 1024}
    assert estimate["tokens"]["max_completion"] == 0
    job = served.client.post("/v1/jobs", json={"endpoint": LOGLIKELIHOOD, "body": body}).json()
    seen = []
    with served.client.stream("GET", job["urls"]["events"]) as events:
        for line in events.iter_lines():
            if line.startswith("event: "):
                seen.append((line[7:], None))
            elif line.startswith("data: "):
                seen[-1] = (seen[-1][0], json.loads(line[6:]))
    steps = [data["step"] for name, data in seen if name == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 1024
    assert not [name for name, _ in seen if name == "denoise"]
    done = seen[-1][1]
    assert (done["status"], done["diffusion"]["algorithm"]) == ("succeeded", "monte_carlo")
    assert done["progress"] == {"tokens_committed": 2, "tokens_total": 2, "step": 1024}

    many = {
        **{k: body[k] for k in ("model", "mc_num")},
        "pairs": [{"context": ASKED, "continuation": "42 " * 90}] * 128,
    }
    job = served.client.post("/v1/jobs", json={"endpoint": LOGLIKELIHOOD, "body": many}).json()
    running = eventually(
        lambda: (j := served.client.get(job["urls"]["self"]).json())["progress"] and j
    )
    assert running["status"] == "running"
    served.client.post(job["urls"]["cancel"])
    assert served.client.get(job["urls"]["self"] + "?wait=20").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"context": None}, "context"),
        ({"continuation": ""}, "continuation"),
        ({"context": []}, "context"),
        ({"continuation": [10**9]}, "continuation"),
        ({"continuation": "1 " * 512}, "continuation"),
        ({"continuation": "<|mdm_mask|>"}, "continuation"),
        ({"method": "guess"}, "method"),
        ({"mc_num": 0}, "mc_num"),
        ({"method": "chain_rule", "mc_num": 8}, "mc_num"),
        ({"method": "chain_rule", "seed": 8}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"pairs": [{"context": "a", "continuation": "b"}]}, "context"),
        ({"context": None, "continuation": None, "pairs": []}, "pairs"),
        (
            {"context": None, "continuation": None, "pairs": [{"context": "a"}]},
            "pairs[0].continuation",
        ),
        (
            {
                "context": None,
                "continuation": None,
                "pairs": [{"context": "a", "continuation": "b", "c": 1}],
            },
            "pairs[0].c",
        ),
    ],
)
def test_loglikelihood_refuses_by_name(served: Served, wrong: dict[str, Any], param: str) -> None:
    refused(served, LOGLIKELIHOOD, {**pair("a ", "b"), **wrong}, param)


def test_both_are_lines_of_batches(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none")
    for path, body, bad in (
        (INFILL, infill(ASKED, 2), infill(ASKED)),
        (LOGLIKELIHOOD, pair(ASKED, "42", mc_num=8, seed=1), pair(ASKED, "", mc_num=8)),
    ):
        lines = [
            {"custom_id": f"c{i}", "method": "POST", "url": path, "body": body} for i in range(2)
        ]
        batch = client.batches.create(
            input_file_id=upload(client, lines).id,
            endpoint=path,  # type: ignore[arg-type]
            completion_window="24h",
        )
        ended = over(client, batch.id)
        assert ended.status == "completed"
        assert ended.output_file_id is not None
        written = [
            json.loads(line)
            for line in client.files.content(ended.output_file_id).text.splitlines()
        ]
        direct = served.client.post(path, json=body).json()
        for key in ("choices", "data"):
            assert [w["response"]["body"].get(key) for w in written] == [direct.get(key)] * 2
        lines[1]["body"] = bad
        batch = client.batches.create(
            input_file_id=upload(client, lines).id,
            endpoint=path,  # type: ignore[arg-type]
            completion_window="24h",
        )
        ended = over(client, batch.id)
        assert ended.status == "failed"
        assert ended.errors is not None and ended.errors.data is not None
        assert [e.line for e in ended.errors.data] == [2]


def test_an_idempotency_key_gives_the_same_score(served: Served) -> None:
    headers = {"idempotency-key": "score-once"}
    first, second = (
        served.client.post(LOGLIKELIHOOD, json=pair(ASKED, "42", mc_num=4), headers=headers).json()
        for _ in range(2)
    )
    assert first == second  # the seed was drawn once
