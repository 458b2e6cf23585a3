"""A result that PostgreSQL refuses ends its job at once: computed once, not charged to the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, StatementError

from shared.db.session import is_outage, is_refusal
from shared.jobs import repository
from shared.jobs.status import JobStatus
from tests.integration.conftest import ROOT, Jobs, WorkerProcess

pytestmark = pytest.mark.integration
Start = Callable[..., WorkerProcess]

_REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'unsupported Unicode escape sequence' USING ERRCODE = '{state}';
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.result IS NOT NULL) EXECUTE FUNCTION refuse();
"""


def test_log_probabilities_of_every_token_are_stored(jobs: Jobs, start_worker: Start) -> None:
    """The vocabulary of this checkpoint has NUL and halves of characters, and `logprobs` makes keys
    of them.
    """
    start_worker(model=ROOT / "tests" / "golden" / "sdar").wait_ready()
    row = jobs.wait_done(jobs.submit(logprobs=20, max_tokens=32), seconds=120)
    assert (row.status, row.error, row.attempt) == ("succeeded", None, 1)
    tops = row.result["choices"][0]["logprobs"]["top_logprobs"]
    assert all(len(top) == 20 for top in tops)


@pytest.mark.parametrize("state", ["22P05", "54000"])
def test_a_refused_result_fails_the_job_at_once(
    jobs: Jobs, start_worker: Start, state: str
) -> None:
    with jobs.database.write() as session:
        session.execute(text(_REFUSE.format(state=state)))
    worker = start_worker().wait_ready()
    job_id = jobs.submit()
    row = jobs.wait_done(job_id)
    assert (row.status, row.attempt, row.failures, row.result) == ("failed", 1, 0, None)
    assert (row.error["code"], row.error["retryable"]) == ("result_not_stored", False)
    assert "unsupported Unicode escape sequence" in row.error["message"]
    assert jobs.outcomes(job_id) == ["failed"]
    assert worker.process.poll() is None
    with jobs.database.write() as session:
        session.execute(text("DROP TRIGGER refuse ON jobs"))
    assert jobs.wait_done(jobs.submit()).status == "succeeded"  # the worker goes on


def test_a_refusal_is_not_an_outage(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    values: list[Any] = [{"a": "\x00"}, {"a": "\ud800"}, {"a": float("nan")}, {"a": {1}}]
    for value in values:
        statement = repository.finish(job_id, 0, JobStatus.FAILED, error=value)
        with (
            pytest.raises((DBAPIError, StatementError, TypeError, ValueError)) as raised,
            jobs.database.write() as session,
        ):
            session.execute(statement)
        assert (is_refusal(raised.value), is_outage(raised.value)) == (True, False)
    with pytest.raises(DBAPIError) as raised, jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET model = :m WHERE id = :i"), {"m": "\x00", "i": job_id}
        )
    assert (is_refusal(raised.value), is_outage(raised.value)) == (True, False)
    with pytest.raises(DBAPIError) as raised, jobs.database.write() as session:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert (is_refusal(raised.value), is_outage(raised.value)) == (False, True)
