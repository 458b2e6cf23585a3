"""The response objects of the endpoints: what a worker stores as a job's `result` and a client reads. Pure functions.

A result is exactly what the endpoint itself answers, so the OpenAI SDK reads a job's result too. What OpenAI has no
field for sits under one key, `vdiff`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)
OBJECTS = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}
_ID_PREFIX = {CHAT: "chatcmpl", COMPLETIONS: "cmpl"}


def response_id(endpoint: str, job_id: str) -> str:
    """The response's id: the job's, spelled as OpenAI does."""
    return f"{_ID_PREFIX[endpoint]}-{job_id.partition('_')[2] or job_id}"


def build_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Real tokens up to the end token, never the canvas; the prompt counts once, whatever `n` is."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choice(endpoint: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    common = {"index": choice["index"], "logprobs": None, "finish_reason": choice["finish_reason"]}
    if endpoint == CHAT:
        return {**common, "message": {"role": "assistant", "content": choice["text"], "refusal": None}}
    return {**common, "text": choice["text"]}


def build_result(
    *,
    endpoint: str,
    job_id: str,
    model: str,
    created: int,
    choices: Sequence[Mapping[str, Any]],
    prompt_tokens: int,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole response of one job.

    Args:
        created: when the job was accepted, seconds since 1970.
        choices: `{index, text, token_ids, finish_reason}` of each answer, without the end token.
        extras: goes under `vdiff`, beside the job's id.
    """
    return {
        "id": response_id(endpoint, job_id),
        "object": OBJECTS[endpoint],
        "created": created,
        "model": model,
        "choices": [_choice(endpoint, c) for c in sorted(choices, key=lambda c: int(c["index"]))],
        "usage": build_usage(prompt_tokens, sum(len(c["token_ids"]) for c in choices)),
        "vdiff": {"job_id": job_id, **extras},
    }
