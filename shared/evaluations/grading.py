"""From a job that is over to a graded sample: the row of `evaluation_samples`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy import Row

from shared.evaluations import sandbox
from shared.evaluations.graders import ERROR, Grader, Verdict, failed, outcome_of
from shared.evaluations.sandbox_pool import SandboxPool
from shared.jobs.status import JobStatus

CHUNK = 100  # answers graded in one transaction
CODE_CHUNK = 8  # of them when code runs: each may take its grader's whole time
TOGETHER = 2  # answers graded at once
PURGED_ERROR = {
    "code": "job_purged",
    "message": "the job was purged before it was graded",
    "param": None,
}

_log = structlog.get_logger(__name__)


def chunk_of(graders: Sequence[Grader]) -> int:
    return CODE_CHUNK if any(g.type == "code" for g in graders) else CHUNK


def unanswered(
    run_id: str, number: int, item: int, repeat: int, job_id: str | None, error: Mapping[str, Any]
) -> dict[str, Any]:
    """A sample without an answer."""
    return {
        "run_id": run_id,
        "number": number,
        "item": item,
        "repeat": repeat,
        "job_id": job_id,
        "outcome": ERROR,
        "output": None,
        "verdicts": [],
        "error": dict(error),
        **dict.fromkeys(
            (
                "completion_tokens",
                "forwards",
                "latency_ms",
                "queued_ms",
                "device_ms",
                "started_at",
                "finished_at",
            )
        ),
    }


def text_of(result: Mapping[str, Any]) -> str:
    """The answer of a response object."""
    choice = result["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


async def grade_all(
    rows: Sequence[Row[Any]],
    graders: Sequence[Grader],
    *,
    run_id: str,
    items: int,
    tenant: str,
    pool: SandboxPool | None,
    seconds: float,
) -> list[Mapping[str, Any]]:
    """Grade the answers of `rows`.

    Args:
        rows: of `repository.to_grade`.
        pool: None where graders may not run code.
        seconds: after which no further answer is begun; those are left for another look.
    """
    slots = asyncio.Semaphore(TOGETHER)
    clock = asyncio.get_running_loop().time
    ends_at = clock() + seconds
    begun = 0

    async def one(row: Row[Any]) -> Mapping[str, Any] | None:
        nonlocal begun
        repeat = (row.batch_line - 1) // items
        if row.status != JobStatus.SUCCEEDED or row.result is None:
            error = row.error or (
                PURGED_ERROR
                if row.purged_at is not None
                else {"code": row.status, "message": row.status}
            )
            return unanswered(run_id, row.batch_line, row.number, repeat, row.id, error)
        output = text_of(row.result)
        async with slots:
            if begun and clock() >= ends_at:
                return None
            begun += 1
            verdicts = [
                await _verdict(grader, output, row.data, tenant, pool) for grader in graders
            ]
        return {
            **unanswered(run_id, row.batch_line, row.number, repeat, row.id, {}),
            "error": None,
            "outcome": outcome_of(verdicts),
            "output": output,
            "verdicts": [
                {"name": g.name, **v.to_json()} for g, v in zip(graders, verdicts, strict=True)
            ],
            **_numbers(row),
        }

    graded = await asyncio.gather(*(one(row) for row in rows))
    return [sample for sample in graded if sample is not None]


async def _verdict(
    grader: Grader, output: str, data: Mapping[str, Any], tenant: str, pool: SandboxPool | None
) -> Verdict:
    try:
        if grader.type != "code":
            return await asyncio.to_thread(grader.grade, output, data)
        if pool is None:
            return failed(
                "code_graders_disabled", "graders that run code were turned off meanwhile"
            )
        return await sandbox.grade(grader, output, data, pool, tenant)
    except Exception as exc:
        # Whatever one answer provokes in a grader must not keep the others from theirs.
        _log.exception("grader_failed", grader=grader.name)
        return failed("grader_failed", f"{type(exc).__name__}: {exc}")


def _numbers(row: Row[Any]) -> dict[str, Any]:
    timing, diffusion = row.timing or {}, row.diffusion or {}
    in_engine = [timing.get(name) for name in ("admitted_ms", "prompt_ms", "denoise_ms")]
    return {
        "completion_tokens": row.usage["completion_tokens"],
        "forwards": diffusion.get("forwards"),
        "latency_ms": sum(value or 0.0 for value in in_engine),
        "queued_ms": timing.get("queued_ms"),
        "device_ms": timing.get("device_ms"),
        "started_at": row.started_at,
        "finished_at": row.finished_at,
    }
