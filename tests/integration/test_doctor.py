"""`vdiff doctor` against real parts: all well, a model that does not load (also on the dashboard's
side), and nothing there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sqlalchemy import insert
from typer.testing import CliRunner

from shared import checkup
from shared.db.tables.webhooks import WebhookEvent
from shared.jobs import repository
from shared.jobs.repository import JOBS
from shared.jobs.status import JobStatus
from shared.webhooks.repository import ATTEMPTS, DELIVERIES, ENDPOINTS
from tests.integration.conftest import ApiProcess, Jobs, Served, WorkerProcess
from vdiff.cli import app
from vdiff.doctor import sender

pytestmark = pytest.mark.integration


def doctor(*options: str, **settings: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["doctor", *options], env={f"VDIFF_{k.upper()}": v for k, v in settings.items()}
    )
    return done.exit_code, done.output


def test_all_well(served: Served, tmp_path: Path) -> None:
    # Jobs for models that nobody serves, left by other tests on the same server, are rightly
    # complained about.
    served.jobs.execute(repository.cancel_where(JOBS.c.status == JobStatus.QUEUED.value))
    where = {
        "database_url": served.jobs.database_url,
        "redis_url": served.jobs.redis_url,
        "base_url": served.url,
    }
    code, said = doctor("--json", **where, data_dir=str(tmp_path))
    found = json.loads(said)
    names = {check["name"] for check in found["checks"]}
    assert names == {
        "database",
        "migrations",
        "clock",
        "workers",
        "queue",
        "webhooks",
        "senders",
        "redis",
        "disk",
        "api",
        "secrets",
    }
    assert (code, found["ok"]) == (0, True), found
    _, text = doctor(**where, data_dir=str(tmp_path))
    assert (
        "\x1b" not in text
        and "ok    workers    vdiff-tiny: 1 worker, 4 slots, cpu" in text.splitlines()
    )
    assert "password" not in text and ":***@" not in text


def test_nothing_there(tmp_path: Path) -> None:
    code, said = doctor(
        "--json",
        database_url="postgresql://who:secret-word@127.0.0.1:1/x",
        redis_url="redis://:secret-word@127.0.0.1:1/0",
        base_url="http://127.0.0.1:1",
        data_dir=str(tmp_path),
    )
    bad = {c["name"]: c["advice"] for c in json.loads(said)["checks"] if c["state"] == "bad"}
    assert code == 1 and set(bad) == {"database", "redis", "api"} and all(bad.values())
    assert "secret-word" not in said


def test_urls_that_are_none_stop_no_other_check(tmp_path: Path) -> None:
    code, said = doctor(
        "--json",
        database_url="postgresql://h:port/x",
        redis_url="redis://h:port/0",
        base_url="http://127.0.0.1:1",
        data_dir=str(tmp_path),
    )
    bad = {c["name"]: c["advice"] for c in json.loads(said)["checks"] if c["state"] == "bad"}
    assert code == 1 and "postgresql://" in bad["database"] and "redis://" in bad["redis"]
    assert {"database", "redis", "api"} == set(bad)


def test_receivers_that_refuse_are_named(served: Served) -> None:
    """The last attempt decides; a delivery that succeeded, or was never tried, is no refusal."""
    with served.jobs.database.write() as session:
        session.execute(
            insert(ENDPOINTS).values(
                id="we_x", tenant="t", url="https://x.example/", events=["job.failed"], secret="s"
            )
        )
        session.execute(
            insert(WebhookEvent).values(id="evt_x", tenant="t", type="job.failed", sequence=1)
        )
        made = {
            name: session.execute(
                insert(DELIVERIES)
                .values(event_id="evt_x", tenant="t", **to)
                .returning(DELIVERIES.c.id)
            ).one()[0]
            for name, to in {
                "refused": {"endpoint_id": "we_x", "attempts": 2},
                "away": {"url": "https://y.example/", "attempts": 1},
                "new": {"endpoint_id": "we_x"},
                "there": {"endpoint_id": "we_x", "attempts": 1, "status": "delivered"},
            }.items()
        }
        for name, attempt, code, error in (
            ("refused", 1, 503, None),
            ("refused", 2, 401, None),
            ("away", 1, None, "no route"),
            ("there", 1, 200, None),
        ):
            values = {
                "delivery_id": made[name],
                "attempt": attempt,
                "status_code": code,
                "error": error,
            }
            session.execute(insert(ATTEMPTS).values(**values, duration_ms=1.0))
        found = [
            row for row in session.execute(checkup.refusing_receivers()) if "example" in row.url
        ]
        session.rollback()
    assert {
        (row.endpoint_id, row.url, row.waiting, row.status_code, row.error) for row in found
    } == {
        ("we_x", "https://x.example/", 1, 401, None),
        (None, "https://y.example/", 1, None, "no route"),
    }


def test_webhooks_that_wait_need_a_sender() -> None:
    waits, none = SimpleNamespace(due=0, failing=3), SimpleNamespace(due=0, failing=0)
    assert [check.state for check in (sender(1, waits), sender(0, none), sender(0, waits))] == [
        "ok",
        "note",
        "bad",
    ]


def test_a_model_that_does_not_load_says_why_everywhere(
    jobs: Jobs, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    broken = tmp_path / "broken-model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llada"}')
    api = ApiProcess(jobs, tmp_path / "api.log")
    try:
        first = start_worker(model=broken)
        assert first.wait(240) == 2
        said = first.tail()
        (logged,) = [
            json.loads(line)
            for line in said.splitlines()
            if line.startswith("{") and "model_not_loaded" in line
        ]
        reason = logged["reason"]
        assert str(broken) in reason and said.splitlines()[-1] == f"vdiff worker: {reason}"
        assert (logged["level"], logged["code"], logged["model"]) == (
            "critical",
            "model_load_failed",
            jobs.model,
        )

        where = {
            "database_url": jobs.database_url,
            "redis_url": jobs.redis_url,
            "base_url": api.url,
        }
        code, text = doctor(**where)
        assert code == 1 and f"{jobs.model} did not load on" in text and reason in text
        api.wait_ready(path="/health")
        (shown,) = httpx.get(f"{api.url}/v1/overview").json()["failures"]
        assert (shown["model"], shown["message"], shown["count"]) == (jobs.model, reason, 1)
    finally:
        api.end()


def test_it_is_the_operators_to_know(served: Served) -> None:
    """Without `admin`, the reason and the machine stay unsaid."""
    from api.routes.overview import failure_object
    from shared import serving

    with served.jobs.database.write() as session:
        session.execute(
            serving.record_failure(
                hostname="h", model="x", code="c", message="/secret/place\x00", pid=1, version="1"
            )
        )
        session.execute(
            serving.record_failure(
                hostname="h", model="x", code="c", message="/secret/place\x00", pid=2, version="1"
            )
        )
        (row,) = session.execute(serving.recent_failures()).all()
        admin: Any = failure_object(row, admin=True)
        other: Any = failure_object(row, admin=False)
        session.rollback()
    assert (admin["message"], admin["count"], admin["pid"]) == ("/secret/place\ufffd", 2, 2)
    assert (other["message"], other["hostname"], other["pid"], other["code"]) == (
        None,
        None,
        None,
        "c",
    )
