"""A job's result: the very object that its endpoint answers with. Pure, so that compatibility is tested without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS)


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def response_id(endpoint: str, job_id: str) -> str:
    """OpenAI's form of an id, made from the job's."""
    return f"{'chatcmpl' if endpoint == CHAT else 'cmpl'}-{job_id.removeprefix('job_')}"


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
    """The response object.

    Args:
        endpoint: one of `ENDPOINTS`.
        created: Unix seconds.
        choices: {index, text, token_ids, finish_reason} each; token_ids are counted for `usage` (real tokens, up to the
            end token).
        extras: what stands under the key `vdiff`.
    """
    chat = endpoint == CHAT
    made = []
    for choice in sorted(choices, key=lambda c: c["index"]):
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": choice["text"], "refusal": None}}
            if chat
            else {"text": choice["text"]}
        )
        made.append({"index": choice["index"], **content, "logprobs": None, "finish_reason": choice["finish_reason"]})
    return {
        "id": response_id(endpoint, job_id),
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": made,
        "usage": usage_of(prompt_tokens, sum(len(c["token_ids"]) for c in choices)),
        "vdiff": dict(extras),
    }
