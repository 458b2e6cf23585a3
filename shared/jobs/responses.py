"""A job's result: the very object that its endpoint answers with. Pure, so that compatibility is tested without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
INFILL = "/v1/infill"
LOGLIKELIHOOD = "/v1/loglikelihood"
RESPONSES = "/v1/responses"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, INFILL, LOGLIKELIHOOD)
_ID_PREFIXES = {CHAT: "chatcmpl", COMPLETIONS: "cmpl", INFILL: "infill", LOGLIKELIHOOD: "ll"}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def response_id(endpoint: str, job_id: str) -> str:
    """OpenAI's form of an id, made from the job's."""
    if endpoint == RESPONSES:
        return f"resp_{job_id.removeprefix('job_')}"
    return f"{_ID_PREFIXES[endpoint]}-{job_id.removeprefix('job_')}"


def chat_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Chat's shape. `bytes` is null where a token is only a part of a character."""

    def one(token: str, logprob: float) -> dict[str, Any]:
        whole = "\ufffd" not in token
        return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}

    content = [
        {**one(t["token"], t["logprob"]), "top_logprobs": [one(*pair) for pair in t.get("top", ())]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def _by_text(top: Sequence[tuple[str, float]] | None) -> dict[str, float] | None:
    """By text; of several tokens that read the same, the likeliest, which comes first."""
    if top is None:
        return None
    made: dict[str, float] = {}
    for text, value in top:
        made.setdefault(text, value)
    return made


def completion_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Completions' shape; `text_offset` counts characters of the answer. A `top` of None is a token without any."""
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token["token"])
    return {
        "tokens": [t["token"] for t in tokens],
        "token_logprobs": [t["logprob"] for t in tokens],
        "top_logprobs": [_by_text(t.get("top", ())) for t in tokens],
        "text_offset": offsets,
    }


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
        endpoint: `CHAT` or `COMPLETIONS`.
        created: Unix seconds.
        choices: {index, text, token_ids, finish_reason, logprobs?} each; token_ids are counted for `usage` (real tokens,
            up to the end token). logprobs: {token, logprob, top: [[token, logprob], ...]} of each token, when asked for.
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
        logprobs = None
        if choice.get("logprobs") is not None:
            logprobs = (chat_logprobs if chat else completion_logprobs)(choice["logprobs"])
        made.append(
            {"index": choice["index"], **content, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}
        )
    return {
        "id": response_id(endpoint, job_id),
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": made,
        "usage": usage_of(prompt_tokens, sum(len(c["token_ids"]) for c in choices)),
        "vdiff": dict(extras),
    }
