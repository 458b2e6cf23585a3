"""A witness of our own in the database: a trigger that notes every change of a job's status, or of
an end. And the final rows.

The product's own tables say how things are; only this says how they came to be so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import psycopg

from tests.chaos.records import AttemptRow, Database, JobRow, Move

_INSTALL = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.moves (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    job_id text NOT NULL, life integer NOT NULL, attempt integer NOT NULL, before text, after text NOT NULL, worker_id text);
CREATE INDEX ON chaos.moves (job_id, n);
CREATE FUNCTION chaos.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO chaos.moves (job_id, life, attempt, before, after)
            VALUES (NEW.id, NEW.life, NEW.attempt, NULL, NEW.status);
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO chaos.moves (job_id, life, attempt, before, after)
            VALUES (OLD.id, OLD.life, OLD.attempt, OLD.status, 'deleted');
    ELSIF (OLD.status, OLD.life, OLD.attempt, OLD.finished_at, OLD.result::text, OLD.error, OLD.usage) IS DISTINCT FROM
          (NEW.status, NEW.life, NEW.attempt, NEW.finished_at, NEW.result::text, NEW.error, NEW.usage) THEN
        INSERT INTO chaos.moves (job_id, life, attempt, before, after, worker_id)
            VALUES (NEW.id, NEW.life, NEW.attempt, OLD.status, NEW.status, coalesce(NEW.worker_id, OLD.worker_id));
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_note AFTER INSERT OR UPDATE OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION chaos.note();
"""
_OPEN = """SELECT (SELECT count(*) FROM jobs WHERE finished_at IS NULL),
                  (SELECT count(*) FROM webhook_deliveries WHERE status = 'pending'),
                  (SELECT count(*) FROM batches WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))"""


def install(url: str, *statements: str) -> None:
    """After the migrations; `statements` plant a bug."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (_INSTALL, *statements):
            connection.execute(statement)


def open_work(url: str) -> tuple[int, int, int]:
    """(jobs, deliveries, batches) that are not over."""
    with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
        row = connection.execute(_OPEN).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def read(url: str) -> Database:
    with psycopg.connect(url, autocommit=True) as connection:

        def rows(statement: str) -> Sequence[tuple[Any, ...]]:
            return connection.execute(statement).fetchall()

        jobs = [
            JobRow(*row)
            for row in rows(
                "SELECT id, tenant, status, life, attempt, max_attempts, cancel_requested, idempotency_key, batch_id, "
                "custom_id, coalesce(array_length(prompt_token_ids, 1), 0), result, error, usage FROM jobs"
            )
        ]
        moves = tuple(
            Move(*row)
            for row in rows(
                "SELECT n, extract(epoch FROM at)::float8, job_id, life, attempt, before, after, worker_id "
                "FROM chaos.moves ORDER BY n"
            )
        )
        attempts = tuple(
            AttemptRow(*row) for row in rows("SELECT job_id, attempt, life, outcome FROM attempts")
        )
        pending = rows("SELECT count(*) FROM webhook_deliveries WHERE status = 'pending'")[0][0]
        pids: dict[int, list[str]] = defaultdict(list)
        for pid, worker_id in rows("SELECT pid, id FROM workers"):
            pids[pid].append(worker_id)
    return Database(
        {job.id: job for job in jobs},
        moves,
        attempts,
        pending,
        {k: tuple(v) for k, v in pids.items()},
    )
