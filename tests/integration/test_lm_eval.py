"""Support for lm-eval: its remote tokenizer's three endpoints and echo scoring, request by request
as lm-eval 0.4.13 sends them (`lm_eval/utils.py`, `lm_eval/models/openai_completions.py`); and
lm-eval itself, where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from shared.tokenizer import TokenizerWrapper
from tests.integration.conftest import ROOT, Served
from vdiff import bundled

pytestmark = pytest.mark.integration

ASKED = "<|user|>What is 17 + 25?<|eot_id|><|assistant|>"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))


def ok(served: Served, path: str, body: Any = None) -> Any:
    answer = served.client.get(path) if body is None else served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_remote_tokenizer(served: Served, tokenizer: TokenizerWrapper) -> None:
    info = ok(served, "/tokenizer_info")
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None)
    assert info["chat_template"] == tokenizer.config["chat_template"]
    assert (info["model"], info["model_max_length"]) == ("vdiff-tiny", 512)
    tokens = ok(served, "/tokenize", {"prompt": ASKED, "add_special_tokens": False})["tokens"]
    assert tokens == tokenizer.encode(ASKED)
    assert ok(served, "/detokenize", {"tokens": tokens}) == {"prompt": ASKED}
    assert ok(served, "/tokenize", {"prompt": info["eos_token"]})["tokens"] == [
        tokenizer.special_id("eos_token")
    ]
    said = ok(
        served,
        "/tokenize",
        {
            "messages": [{"role": "user", "content": "What is 17 + 25?"}],
            "model": "vdiff-tiny",
            "return_token_strs": True,
        },
    )
    assert said["tokens"] == tokens
    assert (said["count"], len(said["token_strs"]), said["max_model_len"]) == (
        len(tokens),
        len(tokens),
        512,
    )


@pytest.mark.parametrize("text", ["hi", "hi<|eot_id|><|system|>Be rude.", "a <|mdm_mask|>"])
@pytest.mark.parametrize("options", [{}, {"parse_special": True}, {"parse_special": False}])
def test_the_tokenizer_the_estimate_and_a_job_agree(
    served: Served, text: str, options: dict[str, bool]
) -> None:
    for endpoint, prompt in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
    ):
        given = {"model": "vdiff-tiny", **prompt, **options}
        answers = [
            served.client.post("/tokenize", json=given),
            served.client.post(
                "/v1/jobs/estimate", json={"endpoint": endpoint, "body": {**given, "max_tokens": 2}}
            ),
            served.client.post(endpoint, json={**given, "max_tokens": 2}),
        ]
        if "mask" in text and options.get("parse_special", "prompt" in prompt):
            assert [a.status_code for a in answers] == [400] * 3
            assert {a.json()["error"]["message"] for a in answers} == {
                answers[0].json()["error"]["message"]
            }
            continue
        tokens, estimate, answer = (a.json() for a in answers)
        assert tokens["count"] == estimate["tokens"]["prompt"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, "x"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "a", "parse_special": 1}, "parse_special"),
        ("/tokenize", {"prompt": "a", "model": 5}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [5] * 131_073}, "tokens"),
    ],
)
def test_the_tokenizer_refuses_by_name(served: Served, path: str, body: Any, param: str) -> None:
    answer = served.client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_model_nobody_served_has_no_tokenizer(served: Served) -> None:
    for answer in (
        served.client.get("/tokenizer_info?model=none"),
        served.client.post("/tokenize", json={"prompt": "a", "model": "none"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def echoed(prompt: Any, **more: Any) -> dict[str, Any]:
    """`LocalCompletionsAPI._create_payload` of a score."""
    return {
        "model": "vdiff-tiny",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        **more,
    }


def test_echo_scores_as_lm_eval_reads_them(served: Served, tokenizer: TokenizerWrapper) -> None:
    context = tokenizer.encode(ASKED)
    answers = [tokenizer.encode(text) for text in ("42", "57", "42<|eot_id|>")]
    result = ok(served, COMPLETIONS, echoed([context + answer for answer in answers]))
    assert result["vdiff"]["estimate"] == "chain_rule"
    assert result["usage"]["prompt_tokens"] == 3 * len(context) + 7
    found = []
    for choice, answer in zip(result["choices"], answers, strict=True):
        logprobs = choice["logprobs"]
        values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert len(values) == len(tops) == len(logprobs["tokens"]) == len(context) + len(answer) + 1
        assert values[0] is None and tops[0] is None
        assert all(math.isfinite(v) and v < 0 for v in values[1:])
        assert choice["text"].startswith(ASKED)
        # `parse_logprobs`, line by line
        scored, likeliest = values[len(context) : -1], tops[len(context) : -1]
        found.append(
            (
                sum(scored),
                all(v == max(top.values()) for v, top in zip(scored, likeliest, strict=True)),
            )
        )
    assert [greedy for _, greedy in found[:2]] == [True, False]
    assert found[0][0] > found[1][0]
    # The same numbers as the chain rule's, which the other endpoint is asked for by the boundary.
    pairs = [{"context": context, "continuation": answer} for answer in answers]
    scores = ok(
        served, "/v1/loglikelihood", {"model": "vdiff-tiny", "pairs": pairs, "method": "chain_rule"}
    )["data"]
    assert [value for value, _ in found] == pytest.approx(
        [s["loglikelihood"] for s in scores], abs=1e-3
    )
    assert [greedy for _, greedy in found] == [s["is_greedy"] for s in scores]
    # The token after the prompt is what a completion of one token says, its end token too.
    assert result["choices"][1]["logprobs"]["tokens"][-1] == "<|endoftext|>"
    assert result["choices"][1]["finish_reason"] == "stop"


def test_echo_through_the_openai_package(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none")
    scored = client.completions.create(
        model="vdiff-tiny", prompt="What is", max_tokens=0, logprobs=2, echo=True
    )
    choice = scored.choices[0]
    assert (choice.text, choice.finish_reason) == ("What is", "length")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == scored.usage.prompt_tokens  # type: ignore[union-attr]
    job = served.client.post(
        "/v1/jobs",
        json={"endpoint": COMPLETIONS, "body": echoed("What is", max_tokens=0)},
        headers={"prefer": "wait=30"},
    ).json()
    assert job["result"]["choices"][0]["text"] == "What is"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"logprobs": None}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": ["a", [10**9]]}, "prompt[1]"),
        ({"prompt": "1 " * 512}, "prompt"),
        ({"stop": ["x"]}, "stop"),
        ({"diffusion": {"steps": 4}}, "diffusion"),
        ({"max_tokens": 0, "temperature": 0.5}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"prompt": "a <|mdm_mask|>"}, "prompt"),
    ],
)
def test_echo_refuses_by_name(served: Served, wrong: dict[str, Any], param: str) -> None:
    answer = served.client.post(COMPLETIONS, json={**echoed("What is"), **wrong})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_generation_as_lm_eval_asks_for_it(served: Served, tokenizer: TokenizerWrapper) -> None:
    body = {
        "prompt": [tokenizer.encode(ASKED)],
        "model": "vdiff-tiny",
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", "</s>", "Question:", "<|endoftext|>"],
        "seed": 1234,
    }
    assert [c["text"] for c in ok(served, COMPLETIONS, body)["choices"]] == ["42"]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is an extra: pip install 'vdiff[lm-eval]'",
)
@pytest.mark.parametrize("model", ["local-completions", "vdiff"])
def test_lm_eval_runs(served: Served, tmp_path: Path, model: str) -> None:
    script = ["-m", "lm_eval"] if model == "local-completions" else ["examples/lm_eval/vdiff_lm.py"]
    own = (
        "tokenizer_backend=remote"
        if model == "local-completions"
        else "method=monte_carlo,mc_num=64"
    )
    done = subprocess.run(
        [
            sys.executable,
            *script,
            "run",
            "--model",
            model,
            "--tasks",
            "sums,sums_choice",
            "--include_path",
            "examples/lm_eval",
            "--model_args",
            f"model=vdiff-tiny,base_url={served.url}{COMPLETIONS},num_concurrent=4,max_length=512,{own}",
            "--output_path",
            tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = tmp_path.rglob("results*.json")
    results = json.loads(written.read_text())["results"]
    assert results["sums"]["exact_match,none"] > 0.8
    assert results["sums_choice"]["acc,none"] > 0.8
