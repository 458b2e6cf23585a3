"""The Celery task: its name, its payload's version, and nothing else. The work is in
`worker.runner`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery

from shared.queue.messages import PAYLOAD_VERSION, is_readable
from shared.queue.names import GENERATE_TASK

_log = structlog.get_logger(__name__)


def register_tasks(
    app: Celery, run_job: Callable[[str], None], put_back: Callable[[str], None]
) -> None:
    """Register `vdiff.generate`; delivery is at least once, and `run_job` gives a duplicate nothing
    to do.

    Args:
        put_back: given the job of a message that a newer program wrote; whoever can read its
            messages gets another.
    """

    @app.task(name=GENERATE_TASK, ignore_result=True)
    def generate(payload: dict[str, Any]) -> None:
        if not is_readable(payload):
            given = payload if isinstance(payload, dict) else {}
            _log.error("payload_version_unknown", version=given.get("v"), known=PAYLOAD_VERSION)
            if isinstance(job_id := given.get("job_id"), str):
                put_back(job_id)
            return
        try:
            run_job(str(payload.get("job_id")))
        except Exception:
            # Not left to Celery, which logs an exception's text: it may quote a prompt. The lease
            # runs out, and it runs again.
            _log.exception("job_broke_unexpectedly", job_id=payload.get("job_id"))
