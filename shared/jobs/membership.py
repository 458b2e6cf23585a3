"""Operations that a job's batch or evaluation run forbids while it is not over.

Its files and samples are made of the jobs as they are: a line that gets another life, loses its
result or is forgotten meanwhile would be missing there, or stand there as something else than it
was.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import ColumnElement, Row, Select, Table, exists, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.batches.status import OVER
from shared.db.tables import Batch, EvaluationRun, Job
from shared.errors import Conflict
from shared.evaluations.status import RunStatus

_J = cast(Table, Job.__table__).c
_B = cast(Table, Batch.__table__).c
_R = cast(Table, EvaluationRun.__table__).c
_OVER = [s.value for s in OVER]


def batch_status(batch_id: str) -> Select[Any]:
    """Its status, which stays that until COMMIT."""
    return select(_B.status).where(_B.id == batch_id).with_for_update(read=True)


def run_status(run_id: str) -> Select[Any]:
    """(evaluation_id, status) of an evaluation's run; the status stays that until COMMIT."""
    return select(_R.evaluation_id, _R.status).where(_R.id == run_id).with_for_update(read=True)


async def refuse_part_of_open(session: AsyncSession, row: Row[Any]) -> None:
    """Args: row: a job's. Raises Conflict; otherwise its batch stays over until COMMIT."""
    if row.batch_id is None:
        return
    status = (await session.execute(batch_status(row.batch_id))).scalar_one_or_none()
    if status is not None and status not in OVER:
        message = f"the job is a line of {row.batch_id}, which is {status}; wait for its end, or cancel it"
        raise Conflict(message, code="batch_not_over")
    run = (await session.execute(run_status(row.batch_id))).one_or_none()
    if run is not None and run.status == RunStatus.IN_PROGRESS:
        message = f"the job is part of {run.evaluation_id}, which is not over; wait for its end, or cancel it"
        raise Conflict(message, code="evaluation_not_over")


def of_none_that_is_open() -> ColumnElement[bool]:
    """The job belongs to no batch and no run, or to one that is over."""
    # Columns by name: the worker's role may read these alone, and EXISTS (SELECT *) needs all.
    open_batch = exists(_B.id).where(_B.id == _J.batch_id, _B.status.not_in(_OVER))
    open_run = exists(_R.id).where(_R.id == _J.batch_id, _R.status == RunStatus.IN_PROGRESS.value)
    return _J.batch_id.is_(None) | (~open_batch & ~open_run)
