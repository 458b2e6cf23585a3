"""The object of `/v1/responses`: of a job at any time, and of a finished one as its result. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.jobs.responses import RESPONSES, chat_logprobs, response_id
from shared.jobs.status import JobStatus
from shared.jobs.tasks import ResponseTask, task_of

_STATUS = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.SUCCEEDED: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
    JobStatus.EXPIRED: "failed",
}


def message_id(job_id: str) -> str:
    return f"msg_{job_id.removeprefix('job_')}"


def output_text(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def message(job_id: str, status: str, *content: dict[str, Any]) -> dict[str, Any]:
    """The one output item."""
    return {
        "id": message_id(job_id),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": list(content),
    }


def response_object(
    job_id: str, model: str, created: int, params: Mapping[str, Any], status: str, **more: Any
) -> dict[str, Any]:
    """A response in whatever state.

    Args:
        params: the job's, with its `ResponseTask`.
        more: fields that the state brings.
    """
    task = task_of(params)
    assert isinstance(task, ResponseTask)
    return {
        "id": response_id(RESPONSES, job_id),
        "object": "response",
        "created_at": created,
        "status": status,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "temperature": params["temperature"],
        "top_p": params["top_p"],
        "tools": [],
        "truncation": "disabled",
        "usage": None,
        **task.shown,
        **more,
    }


def build_result(
    *,
    job_id: str,
    model: str,
    created: int,
    completed: int,
    params: Mapping[str, Any],
    choice: Mapping[str, Any],
    prompt_tokens: int,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """The finished response.

    Args:
        choice: {text, token_ids, finish_reason, logprobs?} as `shared.jobs.responses.build_result`
            takes them.
        extras: what stands under the key `vdiff`.
    """
    cut = choice["finish_reason"] == "length"
    logprobs = None
    if choice.get("logprobs") is not None:
        logprobs = chat_logprobs(choice["logprobs"])["content"]
    status, tokens = "incomplete" if cut else "completed", len(choice["token_ids"])
    usage = {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + tokens,
    }
    return response_object(
        job_id,
        model,
        created,
        params,
        status,
        completed_at=None if cut else completed,
        incomplete_details={"reason": "max_output_tokens"} if cut else None,
        output=[message(job_id, status, output_text(choice["text"], logprobs))],
        usage=usage,
        vdiff=dict(extras),
    )


def of_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The response as its job stands."""
    if row["status"] == JobStatus.SUCCEEDED:
        result: dict[str, Any] = row["result"]
        return result
    status = _STATUS[JobStatus(row["status"])]
    error = None
    if status == "failed":
        told = row["error"] or {"code": row["status"], "message": f"the job is {row['status']}"}
        error = {"code": "server_error", "message": f"{told['code']}: {told['message']}"}
    return response_object(
        row["id"],
        row["model"],
        int(row["created_at"].timestamp()),
        row["params"],
        status,
        error=error,
        vdiff={"job_id": row["id"]},
    )


def input_items(messages: Sequence[tuple[str, str]], of: str) -> list[dict[str, Any]]:
    """The messages of a request's `input` as items of the response `of`, each with an id of its
    own.
    """
    made = []
    for number, (role, text) in enumerate(messages):
        content = (
            {"type": "output_text", "text": text, "annotations": []}
            if role == "assistant"
            else {"type": "input_text", "text": text}
        )
        item_id = f"msg_{of.removeprefix('resp_')}_in{number}"
        made.append(
            {
                "id": item_id,
                "type": "message",
                "role": role,
                "status": "completed",
                "content": [content],
            }
        )
    return made
