"""Evaluations, samples and comparisons on the wire. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from shared.evaluations.graders import ERROR, FAILED, PASSED
from shared.evaluations.requests import sample_seed
from shared.jobs.status import JobStatus
from shared.links import link

OUTCOMES = (ERROR, FAILED, PASSED)


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def urls(evaluation_id: str) -> dict[str, str]:
    own = link(f"/v1/evaluations/{evaluation_id}")
    return {
        "self": own,
        **{name: f"{own}/{name}" for name in ("items", "report", "configurations", "cancel")},
    }


def _common(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "evaluation",
        "name": row.name,
        "status": row.status,
        "created_at": _seconds(row.created_at),
        "finished_at": _seconds(row.finished_at),
        "dataset": row.dataset,
        "items": row._mapping["items"],
        "metadata": row.metadata,
    }


def short_object(row: Any, runs: Sequence[Any]) -> dict[str, Any]:
    """In a list: without results. Args: runs: of `repository.run_names`."""
    mine = [run for run in runs if run.evaluation_id == row.id]
    return {
        **_common(row),
        "progress": {
            "total": sum(run.total for run in mine),
            "graded": sum(run.graded for run in mine),
        },
        "configurations": [{"name": run.name, "status": run.status} for run in mine],
    }


def counts_of(rows: Sequence[Any], names: Sequence[str], column: str) -> dict[str, dict[str, int]]:
    """run_id -> name -> count; every name is there."""
    made: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for row in rows:
        made[row.run_id][row._mapping[column]] = row._mapping["count"]
    return made


def configuration_object(
    run: Any,
    outcomes: Mapping[str, int],
    jobs: Mapping[str, int],
    results: Mapping[str, Any] | None,
    top_errors: Sequence[Mapping[str, Any]],
    *,
    served: bool,
) -> dict[str, Any]:
    """Args: served: whether a live worker has its model."""
    waiting = None
    if jobs[JobStatus.QUEUED.value] and not jobs[JobStatus.RUNNING.value] and not served:
        waiting = f"no live worker serves {run.model}; its jobs wait until {int(run.expires_at.timestamp())}"
    return {
        "name": run.name,
        "run_id": run.id,
        "status": run.status,
        "model": run.model,
        "revision": run.revision,
        "fields": run.fields,
        "seeds": run.seeds,
        "error": run.error,
        "waiting_for": waiting,
        "progress": {"total": run.total, "stored": run.stored, **jobs, **outcomes},
        "results": results,
        "top_errors": list(top_errors),
        "created_at": _seconds(run.created_at),
        "expires_at": _seconds(run.expires_at),
        "finished_at": _seconds(run.finished_at),
    }


def evaluation_object(row: Any, configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    graded = sum(c["progress"][name] for c in configurations for name in OUTCOMES)
    return {
        **_common(row),
        "endpoint": row.endpoint,
        "template": row.template,
        "graders": row.graders,
        "content_hash": row.content_hash,
        "progress": {
            "total": sum(c["progress"]["total"] for c in configurations),
            "graded": graded,
        },
        "configurations": list(configurations),
        "urls": urls(row.id),
    }


def listed_item(row: Any) -> dict[str, Any]:
    """One graded answer in a list: `urls.self` leads to the item's data, the answer and what the
    graders said.
    """
    query = urlencode({"configuration": row.name, "repeat": row.repeat})
    return {
        "object": "evaluation.item",
        "configuration": row.name,
        "item": row.item,
        "line": row.line,
        "repeat": row.repeat,
        "seed": sample_seed(row.seeds[row.repeat], row.item),
        "outcome": row.outcome,
        "error": row.error,
        "job_id": row.job_id,
        "completion_tokens": row.completion_tokens,
        "forwards": row.forwards,
        "latency_ms": row.latency_ms,
        "urls": {"self": link(f"/v1/evaluations/{row.evaluation_id}/items/{row.item}?{query}")},
    }


def item_object(row: Any) -> dict[str, Any]:
    """One graded answer with its item."""
    return {**listed_item(row), "data": row.data, "output": row.output, "graders": row.verdicts}
