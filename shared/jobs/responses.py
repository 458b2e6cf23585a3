"""A job's result: the very object that its endpoint answers with. Pure, so that compatibility is
tested without a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.token_bytes import spell_bytes

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
    r"""Return chat's shape. `token` is the text, or `bytes:\xf0\x9f` where the token is only a part of a character."""

    def one(token: str, raw: Sequence[int], logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(raw)}

    content = [
        {
            **one(t["token"], t["bytes"], t["logprob"]),
            "top_logprobs": [one(*top) for top in t.get("top", ())],
        }
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _by_text(top: Sequence[tuple[str, Sequence[int], float]] | None) -> dict[str, float] | None:
    """Return the alternatives by text, the likeliest first. One that reads as a likelier one is
    named by its bytes.
    """
    if top is None:
        return None
    made: dict[str, float] = {}
    for text, raw, value in top:
        name = text if text not in made else spell_bytes(bytes(raw))
        while name in made:  # two tokens of the same bytes
            name += " "
        made[name] = value
    return made


def completion_logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return completions' shape; `text_offset` counts characters of the choice's text.

    A `top` of None is a token without alternatives.
    """
    return {
        "tokens": [t["token"] for t in tokens],
        "token_logprobs": [t["logprob"] for t in tokens],
        "top_logprobs": [_by_text(t.get("top", ())) for t in tokens],
        "text_offset": [t["offset"] for t in tokens],
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
        choices: {index, text, token_ids, finish_reason, logprobs?} each; token_ids are counted for
            `usage` (real tokens, up to the end token). logprobs, when asked for: of each token
            {token, bytes, offset, logprob, top: [[token, bytes, logprob], ...]}.
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
            {
                "index": choice["index"],
                **content,
                "logprobs": logprobs,
                "finish_reason": choice["finish_reason"],
            }
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
