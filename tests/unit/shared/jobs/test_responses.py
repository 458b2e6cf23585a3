"""Result objects: what the `openai` SDK's own types accept, and what a job object shows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from shared.diffusion_params import DiffusionParams
from shared.jobs.estimate import queued_eta, running_eta
from shared.jobs.responses import CHAT, COMPLETIONS, build_result, response_id
from shared.jobs.status import JobStatus
from shared.jobs.views import attempt_object, first_difference, job_object
from shared.sampling_params import SamplingParams

CHOICES = [
    {"index": 1, "text": "b", "token_ids": [5], "finish_reason": "length"},
    {"index": 0, "text": "a", "token_ids": [5, 6], "finish_reason": "stop"},
]


def result(endpoint: str) -> dict[str, Any]:
    return build_result(
        endpoint=endpoint,
        job_id="job_1",
        model="m",
        created=7,
        choices=CHOICES,
        prompt_tokens=10,
        extras={"job_id": "job_1"},
    )


def test_a_chat_result_is_openais() -> None:
    made = result(CHAT)
    parsed = ChatCompletion.model_validate(made, strict=True)
    assert [c.message.content for c in parsed.choices] == ["a", "b"]
    assert [c.finish_reason for c in parsed.choices] == ["stop", "length"]
    assert (parsed.id, parsed.object, parsed.created, parsed.model) == (
        "chatcmpl-1",
        "chat.completion",
        7,
        "m",
    )
    assert made["vdiff"] == {"job_id": "job_1"}


def test_a_completion_result_is_openais() -> None:
    parsed = Completion.model_validate(result(COMPLETIONS), strict=True)
    assert [(c.index, c.text) for c in parsed.choices] == [(0, "a"), (1, "b")]
    assert (parsed.id, parsed.object) == ("cmpl-1", "text_completion")
    assert parsed.usage is not None
    assert (
        parsed.usage.prompt_tokens,
        parsed.usage.completion_tokens,
        parsed.usage.total_tokens,
    ) == (10, 3, 13)


def test_ids() -> None:
    assert response_id(CHAT, "job_abc") == "chatcmpl-abc"
    assert response_id(COMPLETIONS, "job_abc") == "cmpl-abc"


def resolved() -> SamplingParams:
    return SamplingParams(
        diffusion=DiffusionParams(algorithm="low_confidence", block_length=16, cache="none")
    )


def row(status: str, **more: Any) -> dict[str, Any]:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    nothing = dict.fromkeys(
        (
            "custom_id",
            "batch_id",
            "started_at",
            "finished_at",
            "progress",
            "result",
            "error",
            "usage",
            "timing",
            "diffusion",
            "start_by",
            "complete_by",
            "max_run_seconds",
            "retain_seconds",
            "purged_at",
            "replay_of",
            "webhook",
        )
    )
    return {
        "id": "job_1",
        "endpoint": CHAT,
        "model": "m",
        "priority": "normal",
        "metadata": {},
        "created_at": at,
        "queued_at": at,
        "attempt": 0,
        "life": 1,
        "losses": 0,
        "isolation": None,
        "cancel_requested": False,
        "params": resolved().to_json(),
        **nothing,
        "status": status,
        **more,
    }


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_job_object(status: JobStatus) -> None:
    shown = job_object(row(status.value), queue_position=3, eta_seconds=1.5)
    assert shown["object"] == "job"
    assert shown["done"] == (status not in (JobStatus.QUEUED, JobStatus.RUNNING))
    assert shown["queue_position"] == (3 if status == JobStatus.QUEUED else None)
    assert shown["eta_seconds"] == (None if shown["done"] else 1.5)
    assert shown["created_at"] == 1767225600
    assert shown["diffusion"]["algorithm"] == "low_confidence"
    assert all(url.startswith("/v1/jobs/job_1") for url in shown["urls"].values())


def test_an_attempt_object() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    shown = attempt_object(
        {
            "attempt": 1,
            "life": 1,
            "worker_id": "w",
            "outcome": "lost",
            "alone": True,
            "started_at": at,
            "ended_at": None,
            "error": {"code": "c"},
        }
    )
    assert (shown["object"], shown["outcome"], shown["ended_at"], shown["error"]) == (
        "job.attempt",
        "lost",
        None,
        {"code": "c"},
    )


def test_estimates_say_nothing_where_nothing_was_measured() -> None:
    assert running_eta(None, 5) is None
    assert running_eta({"tokens_committed": 0, "tokens_total": 10}, 5) is None
    assert running_eta({"tokens_committed": 5, "tokens_total": 10}, 5) == 5.0
    assert queued_eta(1, []) is None
    assert queued_eta(1, [{"slots": 2, "stats": {}}]) is None
    measured = {"slots": 2, "stats": {"jobs_succeeded": 10, "job_ms": 20_000}}
    assert queued_eta(1, [measured]) == 2.0
    assert queued_eta(3, [measured]) == 4.0
    assert queued_eta(3, [measured, measured]) == 3.0


def test_where_two_texts_part() -> None:
    before, after = result(CHAT), result(CHAT)
    assert first_difference(before, after) is None
    after["choices"][1]["message"]["content"] = "bX"
    assert first_difference(before, after) == {
        "choice": 1,
        "position": 1,
        "before": "",
        "after": "X",
    }
    after["choices"].pop()
    assert first_difference(before, after) == {
        "choice": 1,
        "position": 0,
        "before": "b",
        "after": "",
    }


LOGPROBS = [
    {
        "token": "a",
        "bytes": [97],
        "offset": 0,
        "logprob": -0.5,
        "top": [["a", [97], -0.5], ["b", [98], -1.0]],
    },
    {
        "token": "bytes:\\xe2",
        "bytes": [0xE2],
        "offset": 1,
        "logprob": -0.25,
        "top": [["x", [120], -0.5], ["x", [120], -1.5]],
    },
]


def test_logprobs_are_openais() -> None:
    choices = [
        {
            "index": 0,
            "text": "a",
            "token_ids": [5, 6],
            "finish_reason": "stop",
            "logprobs": LOGPROBS,
        }
    ]
    common = {
        "job_id": "job_1",
        "model": "m",
        "created": 7,
        "prompt_tokens": 1,
        "extras": {},
        "choices": choices,
    }
    chat = (
        ChatCompletion.model_validate(build_result(endpoint=CHAT, **common), strict=True)
        .choices[0]
        .logprobs
    )
    assert chat is not None and chat.content is not None
    assert [(t.token, t.logprob, t.bytes) for t in chat.content] == [
        ("a", -0.5, [97]),
        ("bytes:\\xe2", -0.25, [0xE2]),
    ]
    assert [(t.token, t.logprob) for t in chat.content[0].top_logprobs] == [
        ("a", -0.5),
        ("b", -1.0),
    ]
    plain = (
        Completion.model_validate(build_result(endpoint=COMPLETIONS, **common), strict=True)
        .choices[0]
        .logprobs
    )
    assert plain is not None
    assert (plain.tokens, plain.token_logprobs, plain.text_offset) == (
        ["a", "bytes:\\xe2"],
        [-0.5, -0.25],
        [0, 1],
    )
    assert plain.top_logprobs == [{"a": -0.5, "b": -1.0}, {"x": -0.5, "bytes:\\x78": -1.5}]
