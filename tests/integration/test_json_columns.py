"""JSON columns keep the order of keys and every digit; rows of the jsonb schema are converted while
processes work.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from migrations import json_columns, run
from shared.db.session import Database, sync_engine_unpooled
from shared.jobs import queries, repository
from tests.integration.conftest import Jobs, Served, eventually

pytestmark = pytest.mark.integration

_OLD_JOB = """
INSERT INTO jobs (id, endpoint, model, body, params, prompt_token_ids, status, result, finished_at, error)
VALUES (:id, '/v1/completions', 'm', CAST(:body AS jsonb), '{"n": 1}', '{1}', :status, CAST(:result AS jsonb),
        CASE WHEN :status = 'queued' THEN NULL ELSE now() END, CASE WHEN :status = 'failed' THEN CAST('{}' AS jsonb) END)
"""


def _insert(connection: Connection, id: str, *, status: str = "queued", result: Any = None) -> None:
    body = {"seed": 2**53 + 1, "model": "m", "é": 0.5}
    values = {"id": id, "body": json.dumps(body), "status": status}
    connection.execute(
        text(_OLD_JOB), {**values, "result": None if result is None else json.dumps(result)}
    )


def test_rows_of_the_previous_schema_are_converted(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that old processes write meanwhile, and after a conversion that broke off half
    way.
    """
    monkeypatch.setattr(json_columns, "CHUNK", 7)
    run.upgrade(empty_database_url, "0017")
    engine = sync_engine_unpooled(empty_database_url)
    with engine.begin() as connection:
        for i in range(30):
            status = ("queued", "succeeded", "failed")[i % 3]
            _insert(
                connection,
                f"job_{i:03}",
                status=status,
                result={"b": [i], "a": None} if i % 3 == 1 else None,
            )
        connection.execute(
            text(
                "INSERT INTO evaluations (id, tenant, name, content_hash, dataset, endpoint, template, graders, items, "
                "window_seconds) VALUES ('e', 't', 'n', 'h', '{}', '/v1/completions', '\"{{q}}\"', '[]', 1, 1)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO evaluation_items (evaluation_id, number, line, key, cluster, data) "
                "SELECT 'e', n, n, 'k', 'c', jsonb_build_object('q', n) FROM generate_series(1, 30) n"
            )
        )
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection:  # broken off before the checks
        broken = replace(
            json_columns.JOBS, checks={"broken": "no_such_column", **json_columns.JOBS.checks}
        )
        with pytest.raises(Exception, match="no_such_column"):
            json_columns.prepare(connection, broken)
        assert not json_columns.is_prepared(connection, json_columns.JOBS)
    stop, written = threading.Event(), []

    def old_process() -> None:
        """Insert, finish and purge as the previous version does, until the conversion is over."""
        with autocommit.connect() as connection:
            while not stop.is_set():
                id = f"job_live_{len(written):05}"
                _insert(connection, id)
                connection.execute(
                    text(
                        "UPDATE jobs SET status = 'succeeded', finished_at = now(), result = CAST(:r AS jsonb) WHERE id = :i"
                    ),
                    {"i": id, "r": '{"z": 1, "a": 2}'},
                )
                written.append(id)

    writer = threading.Thread(target=old_process)
    writer.start()
    try:
        run.upgrade(empty_database_url, "0020")
        before = len(written)
        while (
            len(written) < before + 20 and writer.is_alive()
        ):  # its statements fit the new columns too
            stop.wait(0.01)
    finally:
        stop.set()
        writer.join(30)
    assert len(written) >= before + 20
    run.upgrade(empty_database_url)
    database = Database(empty_database_url)
    with database.read() as session:
        rows = {row.id: row for row in session.execute(text("SELECT * FROM jobs"))}
        data = session.execute(
            text("SELECT number, data, pg_typeof(data)::text FROM evaluation_items")
        ).all()
        kinds = dict(
            session.execute(
                text(
                    "SELECT a.attname, format_type(a.atttypid, NULL) FROM pg_attribute a "
                    "WHERE attrelid = 'jobs'::regclass AND attname IN ('body', 'params', 'result')"
                )
            ).all()
        )
    database.dispose()
    assert set(kinds.values()) == {"json"} and len(kinds) == 3
    assert sorted(data) == [(n, {"q": n}, "json") for n in range(1, 31)]
    assert len(rows) == 30 + len(written)
    for id, row in rows.items():
        assert row.body == {"seed": 2**53 + 1, "model": "m", "é": 0.5}, id
        assert (row.result is not None) == (row.status == "succeeded"), id
    assert rows["job_004"].result == {"b": [4], "a": None}


@contextmanager
def converting(url: str, *, lock_timeout_ms: int) -> Iterator[Connection]:
    """The connection of a conversion, of a database of the previous schema with 30 jobs and the new
    columns.
    """
    run.upgrade(url, "0017")
    engine = sync_engine_unpooled(url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for i in range(30):
            _insert(connection, f"job_{i:03}")
        columns = ", ".join(f"ADD COLUMN {name}_json json" for name in json_columns.JOBS.columns)
        connection.execute(text(f"ALTER TABLE jobs {columns}"))
        connection.execute(text(json_columns.JOBS.create_trigger))
        connection.execute(text(f"SET lock_timeout = {lock_timeout_ms}"))
        yield connection


def _unfilled(connection: Connection) -> int:
    return int(
        connection.execute(text("SELECT count(*) FROM jobs WHERE body_json IS NULL")).scalar_one()
    )


@pytest.mark.parametrize("whole", [False, True], ids=["fill", "prepare"])
def test_a_conversion_waits_for_a_lock_again(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Another transaction holds a row for longer than `lock_timeout`; the conversion then goes on
    behind it.
    """
    monkeypatch.setattr(json_columns, "CHUNK", 7)
    pauses: list[int] = []
    with converting(empty_database_url, lock_timeout_ms=50) as connection:
        with sync_engine_unpooled(empty_database_url).connect() as other:
            other.execute(text("UPDATE jobs SET custom_id = 'x' WHERE id = 'job_010'"))

            def pause(number: int) -> None:
                pauses.append(number)
                if len(pauses) == 3:
                    other.commit()

            monkeypatch.setattr(json_columns, "_pause", pause)
            (json_columns.prepare if whole else json_columns.fill)(connection, json_columns.JOBS)
        assert pauses == [0, 1, 2]
        assert _unfilled(connection) == 0
        custom = connection.execute(
            text("SELECT custom_id FROM jobs WHERE id = 'job_010'")
        ).scalar_one()
        assert custom == "x"


def test_a_conversion_gives_up_at_a_lock_that_stays(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_columns, "TRIES", 3)
    pauses: list[int] = []
    monkeypatch.setattr(json_columns, "_pause", pauses.append)
    with converting(empty_database_url, lock_timeout_ms=50) as connection:
        with sync_engine_unpooled(empty_database_url).connect() as other:
            other.execute(text("UPDATE jobs SET custom_id = 'x' WHERE id = 'job_010'"))
            with pytest.raises(OperationalError, match="lock timeout"):
                json_columns.fill(connection, json_columns.JOBS)
        assert pauses == [0, 1]
        json_columns.fill(connection, json_columns.JOBS)
        assert _unfilled(connection) == 0


def test_a_conversion_survives_a_deadlock(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    wait = json_columns._pause

    def pause(number: int) -> None:
        pauses.append(number)
        wait(number)  # so that the other transaction goes first

    monkeypatch.setattr(json_columns, "_pause", pause)
    with converting(empty_database_url, lock_timeout_ms=60_000) as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        filler = threading.Thread(target=json_columns.fill, args=(connection, json_columns.JOBS))
        engine = sync_engine_unpooled(empty_database_url)
        with (
            engine.connect() as other,
            engine.execution_options(isolation_level="AUTOCOMMIT").connect() as watcher,
        ):
            other.execute(
                text("SET deadlock_timeout = '60s'")
            )  # the conversion is the one that PostgreSQL ends
            other.execute(text("UPDATE jobs SET custom_id = 'x' WHERE id = 'job_002'"))
            filler.start()
            waits = text(
                "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND wait_event_type = 'Lock'"
            )
            eventually(
                lambda: watcher.execute(waits, {"pid": pid}).scalar_one(),
                what="the conversion waits",
            )
            other.execute(text("UPDATE jobs SET custom_id = 'x' WHERE id = 'job_001'"))
            other.commit()
        filler.join(60)
        assert not filler.is_alive() and pauses
        assert _unfilled(connection) == 0
        assert (
            connection.execute(text("SELECT count(*) FROM jobs WHERE custom_id = 'x'")).scalar_one()
            == 2
        )


def test_columns_keep_keys_and_digits(jobs: Jobs) -> None:
    body = {
        "zz": 1,
        "a": {"bb": 2**63, "b": -0.0, "ccc": 1e30, "aa": 0.1},
        "model": "日本\U0001f600",
        "": [12345678901234567890],
    }
    values = {
        "id": "job_x",
        "endpoint": "/v1/completions",
        "model": "m",
        "body": body,
        "params": body,
        "prompt_token_ids": [1],
    }
    jobs.execute(queries.insert_job(values))
    row = jobs.row("job_x")
    assert json.dumps(row.body) == json.dumps(row.params) == json.dumps(body)
    jobs.execute(repository.claim("job_x", worker_id="w", lease_seconds=60))
    jobs.execute(repository.finish("job_x", 1, repository.JobStatus.SUCCEEDED, result=body))
    assert json.dumps(jobs.row("job_x").result) == json.dumps(body)
    with jobs.database.read() as session:
        stored = session.execute(
            text("SELECT result::text FROM jobs WHERE id = 'job_x'")
        ).scalar_one()
    assert "日本" in stored  # characters take their own bytes, not six


def test_an_input_comes_back_as_it_was_sent(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {
            "zebra": {"type": "boolean"},
            "ant": {"type": "integer"},
            "m": {"enum": ["b", "a"]},
        },
        "required": ["zebra", "ant", "m"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"schema": schema, "name": "n"}}
    body = {
        "seed": 2**53 + 1,
        "model": served.model,
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": form,
        "max_tokens": 60,
        "temperature": 0,
    }
    made = (
        served.client.post("/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": body})
        .raise_for_status()
        .json()
    )
    served.jobs.wait_done(made["id"])
    told = served.client.get(f"/v1/jobs/{made['id']}/input").raise_for_status().json()
    assert json.dumps(told["body"]) == json.dumps(body)
    result = served.client.get(f"/v1/jobs/{made['id']}/result").raise_for_status().json()
    assert list(result)[:4] == ["id", "object", "created", "model"]
    # The keys of the answer come in the schema's order, in jobs as in a request that waits.
    assert list(json.loads(result["choices"][0]["message"]["content"])) == ["zebra", "ant", "m"]
    waited = served.client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert list(json.loads(waited["choices"][0]["message"]["content"])) == ["zebra", "ant", "m"]


def test_a_response_repeats_its_schema_in_order(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"zz": {"type": "null"}, "a": {"type": "null"}},
        "required": ["zz", "a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "n", "schema": schema}
    body = {"model": served.model, "input": "Hi", "text": {"format": form}, "max_output_tokens": 60}
    told = served.client.post("/v1/responses", json=body).raise_for_status().json()
    again = served.client.get(f"/v1/responses/{told['id']}").raise_for_status().json()
    for response in (told, again):
        assert json.dumps(response["text"]["format"]["schema"]) == json.dumps(schema)
        assert list(json.loads(response["output"][0]["content"][0]["text"])) == ["zz", "a"]
