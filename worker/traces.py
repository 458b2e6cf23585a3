"""Spans of an attempt, under the trace that its job came with. Times that are known only afterwards
are written afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared import tracing
from worker.engine.outputs import RequestMetrics


@contextmanager
def attempt(job: Any, *, began: float, worker_id: str) -> Iterator[None]:
    """One execution of a claimed job; its claim began at `began` (`time.time()`), before anybody
    knew whose it would be.
    """
    if not tracing.is_on():
        yield
        return
    # Of the database's clock, as far as it agrees with ours: the queue must not end after the
    # attempt began.
    waited = max((job.started_at - job.queued_at).total_seconds(), 0.0)
    tracing.past(
        "vdiff.queue",
        began - waited,
        began,
        parent=job.traceparent,
        job_id=job.id,
        priority=job.priority,
    )
    with tracing.span(
        "vdiff.attempt",
        parent=job.traceparent,
        kind="CONSUMER",
        began=began,
        job_id=job.id,
        attempt=job.attempt,
        model=job.model,
        worker_id=worker_id,
    ):
        tracing.past("vdiff.claim", began, time.time())
        yield


def engine(metrics: RequestMetrics) -> None:
    """Record the engine's work for the current attempt."""
    scheduled = metrics.first_scheduled_time or metrics.finished_time
    denoising = metrics.prompt_done_time or scheduled
    tracing.past("vdiff.engine.wait", metrics.arrival_time, scheduled)
    tracing.past("vdiff.engine.prompt", scheduled, denoising, tokens=metrics.prompt_tokens)
    tracing.past(
        "vdiff.engine.denoise",
        denoising,
        metrics.finished_time,
        tokens=metrics.generated_tokens,
        forwards=metrics.forwards,
        tokens_per_forward=metrics.tokens_per_forward,
    )
