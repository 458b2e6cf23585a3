"""Large deletions: marked at once, removed in chunks, however much there is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import text

from shared.evaluations import repository as evaluations
from shared.events import EventPublisher
from shared.jobs import caretaking
from shared.maintenance import Maintenance
from shared.removals import in_chunks
from shared.webhooks import repository as webhooks
from tests.integration.conftest import Jobs

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def long_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine, one round does all."""
    monkeypatch.setattr("shared.removals.SLICE_SECONDS", 120.0)


def maintenance(jobs: Jobs, *, forget_after_seconds: float | None = None) -> Maintenance:
    return Maintenance(
        jobs.database,
        jobs.redis,
        EventPublisher(jobs.redis, stream_length=10, stream_seconds=60),
        sweep_seconds=60,
        repush_after_seconds=60,
        lease_seconds=60,
        forget_after_seconds=forget_after_seconds,
    )


def execute(jobs: Jobs, statement: str, **values: Any) -> None:
    with jobs.database.write() as session:
        session.execute(text(statement), values)


def count(jobs: Jobs, statement: str) -> int:
    with jobs.database.read() as session:
        return int(session.execute(text(statement)).scalar_one())


JOBS = """
INSERT INTO jobs (id, endpoint, model, status, body, params, prompt_token_ids, result, created_at, finished_at,
                  purge_after, idempotency_key)
SELECT 'job_' || n, '/v1/completions', 'm', 'succeeded', '{}', '{}', '{1}', '{}', now() - interval '3 d',
       now() - interval '2 d', now() - interval '1 d', 'key-' || n
FROM generate_series(1, :rows) AS n
"""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks so small that each round needs many; returns the transactions' largest."""
    monkeypatch.setattr(caretaking, "REMOVE_CHUNK", 50)
    for function in (
        caretaking.purge_due,
        caretaking.delete_old,
        caretaking.forget_idempotency_keys,
    ):
        assert function.__kwdefaults__ is not None
        monkeypatch.setitem(function.__kwdefaults__, "limit", 50)
    return 50


def test_one_round_of_retention_does_all_that_is_due(
    jobs: Jobs, small_chunks: int, most_changed: list[int]
) -> None:
    """Rows are removed chunk after chunk in one round, not one chunk a round."""
    execute(jobs, JOBS, rows=1_000)
    keeper = maintenance(jobs, forget_after_seconds=86_400)
    most_changed.clear()
    keeper.purge_results()
    assert count(jobs, "SELECT count(*) FROM jobs WHERE purged_at IS NOT NULL") == 1_000
    keeper.free_keys()
    assert count(jobs, "SELECT count(*) FROM jobs WHERE idempotency_key IS NOT NULL") == 0
    keeper.forget_jobs()
    assert count(jobs, "SELECT count(*) FROM jobs") == 0
    assert max(most_changed) <= small_chunks


@pytest.fixture
def most_changed(jobs: Jobs) -> list[int]:
    """The rows that each statement of the jobs' database changed or returned."""
    from sqlalchemy import event

    rows: list[int] = []

    def note(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if statement.lstrip().startswith(("UPDATE", "DELETE")):
            rows.append(cursor.rowcount)

    event.listen(jobs.database.engine, "after_cursor_execute", note)
    return rows


def test_late_jobs_all_expire_in_one_round(jobs: Jobs) -> None:
    execute(
        jobs,
        "INSERT INTO jobs (id, endpoint, model, body, params, prompt_token_ids, complete_by) SELECT 'job_' || n, '/v1/x', "
        "'m', '{}', '{}', '{1}', now() - interval '1 h' FROM generate_series(1, 1200) n",
    )
    maintenance(jobs).expire_jobs()
    assert count(jobs, "SELECT count(*) FROM jobs WHERE status = 'expired'") == 1_200


def test_a_slice_ends_and_says_that_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = threading.Event()
    done = iter([5, 5, 3])
    assert (found := in_chunks(lambda: next(done), 5, stopping)).count == 13 and not found.is_cut
    monkeypatch.setattr("shared.removals.SLICE_SECONDS", 0.0)
    assert in_chunks(lambda: 5, 5, stopping).count == 5
    assert in_chunks(lambda: 5, 5, stopping).is_cut
    stopping.set()
    assert in_chunks(lambda: 5, 5, stopping).count == 0


ENDPOINT = "INSERT INTO webhook_endpoints (id, tenant, url, events, secret) VALUES (:id, 'mine', 'https://x', '{}', 's')"
DELIVERIES = """
WITH made AS (
    INSERT INTO webhook_events (id, tenant, type, sequence) SELECT :id || n, 'mine', 'job.succeeded', 1
    FROM generate_series(1, :rows) n RETURNING id),
sent AS (
    INSERT INTO webhook_deliveries (event_id, tenant, endpoint_id, status) SELECT id, 'mine', :id, 'delivered' FROM made
    RETURNING id)
SELECT count(*) FROM sent
"""


def test_an_endpoint_with_many_deliveries_is_gone_at_once(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, most_changed: list[int]
) -> None:
    for endpoint in ("we_a", "we_b"):
        execute(jobs, ENDPOINT, id=endpoint)
        execute(jobs, DELIVERIES, id=endpoint, rows=500)
    execute(
        jobs,
        "INSERT INTO webhook_attempts (delivery_id, attempt, duration_ms) SELECT id, 1, 1 FROM webhook_deliveries",
    )
    most_changed.clear()
    with jobs.database.write() as session:
        assert session.execute(webhooks.delete_endpoint("we_a", "mine")).one_or_none() is not None
    assert most_changed == [1]
    with jobs.database.write() as session:
        assert session.execute(webhooks.get_endpoint("we_a", "mine")).one_or_none() is None
        assert [
            row.id for row in session.execute(webhooks.list_endpoints("mine", after=None, limit=9))
        ] == ["we_b"]
        assert session.execute(webhooks.count_endpoints("mine")).scalar_one() == 1
        assert session.execute(webhooks.delete_endpoint("we_a", "mine")).one_or_none() is None
    monkeypatch.setitem(webhooks.remove_deleted.__globals__, "REMOVE_CHUNK", 40)
    monkeypatch.setattr(webhooks.remove_deleted, "__defaults__", (40,))
    maintenance(jobs).remove_deleted()
    assert max(most_changed) <= 40
    assert count(jobs, "SELECT count(*) FROM webhook_endpoints") == 1
    assert count(jobs, "SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = 'we_b'") == 500
    assert count(jobs, "SELECT count(*) FROM webhook_deliveries") == 500
    assert count(jobs, "SELECT count(*) FROM webhook_attempts") == 500


def test_a_deleted_evaluation_is_gone_at_once_and_can_be_made_again(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, most_changed: list[int]
) -> None:
    values = "(:id, 'mine', 'n', 'completed', 'same', '{}', '/v1/chat/completions', '\"x\"', '[]', 300, 60, now(), now())"
    made = (
        "INSERT INTO evaluations (id, tenant, name, status, content_hash, dataset, endpoint, template, graders, items, "
        f"window_seconds, created_at, finished_at) VALUES {values}"
    )
    execute(jobs, made, id="eval_1")
    execute(
        jobs,
        "INSERT INTO evaluation_items (evaluation_id, number, line, key, cluster, data) "
        "SELECT 'eval_1', n, n, 'k', 'c', '{}' FROM generate_series(1, 300) n",
    )
    execute(
        jobs,
        "INSERT INTO evaluation_runs (id, evaluation_id, position, name, status, model, fields, seeds, content_hash, total, "
        "expires_at, finished_at) "
        "VALUES ('evalrun_1', 'eval_1', 1, 'r', 'completed', 'm', '{}', '{1}', 'h', 300, now(), now())",
    )
    execute(
        jobs,
        "INSERT INTO evaluation_samples (run_id, number, item, repeat, outcome) SELECT 'evalrun_1', n, n, 0, 'passed' "
        "FROM generate_series(1, 300) n",
    )
    most_changed.clear()
    with jobs.database.write() as session:
        assert session.execute(evaluations.remove("eval_1")).one_or_none() is not None
    with jobs.database.read() as session:
        assert session.execute(evaluations.get("eval_1", "mine")).one_or_none() is None
        assert (
            session.execute(evaluations.list_evaluations("mine", after=None, limit=9)).all() == []
        )
    with jobs.database.write() as session:
        assert session.execute(evaluations.by_content("mine", "same")).one_or_none() is None
        assert session.execute(evaluations.lock("eval_1")).one_or_none() is None
        session.execute(
            text(
                "UPDATE evaluations SET status = 'in_progress', finished_at = NULL WHERE id = 'eval_1'"
            )
        )
        assert session.execute(evaluations.claim("holder", 60)).one_or_none() is None
        session.execute(
            text(
                "UPDATE evaluations SET status = 'completed', finished_at = now() WHERE id = 'eval_1'"
            )
        )
    most_changed.clear()
    execute(jobs, made, id="eval_2")  # the same dataset, template and graders
    monkeypatch.setattr(evaluations.remove_deleted, "__defaults__", (40,))
    maintenance(jobs).remove_deleted()
    assert max(most_changed) <= 40
    for table, left in (
        ("evaluations", 1),
        ("evaluation_items", 0),
        ("evaluation_runs", 0),
        ("evaluation_samples", 0),
    ):
        assert count(jobs, f"SELECT count(*) FROM {table}") == left


async def test_a_large_file_goes_in_chunks_and_expired_files_go_without_a_pause(jobs: Jobs) -> None:
    from shared.db.session import AsyncDatabase
    from shared.files import repository as files
    from shared.files.service import FileService

    execute(
        jobs,
        "INSERT INTO files (id, tenant, filename, purpose, store, status, expires_at) SELECT 'file-' || n, 'mine', 'f', "
        "'batch', 'database', 'ready', now() - interval '1 h' FROM generate_series(1, 70) n",
    )
    rows = 2 * files.CHUNKS_AT_ONCE + 3
    execute(
        jobs,
        "INSERT INTO file_chunks SELECT 'file-1', n, 'x' FROM generate_series(1, :rows) n",
        rows=rows,
    )
    database = AsyncDatabase(jobs.database_url)
    try:
        service = FileService(database, None, max_bytes=1)
        rounds = 0
        while await service.clean():
            rounds += 1
            assert rounds < 20
    finally:
        await database.dispose()
    assert (
        count(jobs, "SELECT count(*) FROM files") == 0
        and count(jobs, "SELECT count(*) FROM file_chunks") == 0
    )
