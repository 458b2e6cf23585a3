"""A database role for each process: real processes under these roles, and what each role is
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
from prometheus_client import Counter
from sqlalchemy import Executable, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError

import shared.db.tables  # noqa: F401
from migrations import grants, run
from shared import counts, maintenance_counts, serving
from shared.db.base import Base
from shared.db.session import Database, sync_engine_unpooled
from shared.evaluations import repository as evaluations
from shared.events import EventPublisher
from shared.jobs import caretaking, lanes, lease_clock, repository, suspects
from shared.maintenance import Maintenance
from shared.settings import load_settings
from shared.usage import repository as usage
from shared.webhooks import repository as webhooks
from tests.integration.conftest import (
    ROOT,
    ApiProcess,
    Jobs,
    WorkerProcess,
    eventually,
    jobs_with_database,
    new_key,
)
from tests.integration.test_api_jobs import CHAT, chat_job
from tests.integration.test_api_keys import auth
from tests.integration.test_webhooks import Receiver, receiver, start_deliver  # noqa: F401
from vdiff import bundled

pytestmark = pytest.mark.integration
PASSWORDS = {"api": "api-pass", "worker": "worker-pass", "deliver": "deliver-pass"}


@dataclass(frozen=True)
class Roles:
    jobs: Jobs
    urls: dict[str, str]  # by the name of the process


def make_roles(url: str) -> None:
    """Run deploy/postgresql/roles.sql, as its head says."""
    options = " ".join(
        f"-c vdiff.{part}_password={password}" for part, password in PASSWORDS.items()
    )
    engine = sync_engine_unpooled(make_url(url).render_as_string(hide_password=False))
    with engine.connect() as connection:
        for part in options.split("-c ")[1:]:
            name, _, value = part.strip().partition("=")
            connection.execute(
                text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value}
            )
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute((ROOT / "deploy/postgresql/roles.sql").read_text())
        connection.commit()
    engine.dispose()


@pytest.fixture(scope="module")
def roles(postgres_url: str, redis_url: str, migrated_template: str) -> Iterator[Roles]:
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        for _ in range(2):  # safe to repeat
            make_roles(jobs.database_url)
            run.upgrade(jobs.database_url)
        owner = make_url(jobs.database_url)
        urls = {
            part: owner.set(username=f"vdiff_{part}", password=password).render_as_string(
                hide_password=False
            )
            for part, password in PASSWORDS.items()
        }
        yield Roles(jobs, urls)
        drop_roles(jobs)


def drop_roles(jobs: Jobs) -> None:
    """Roles belong to the whole server, on which other tests run."""
    with jobs.database.write() as session:
        for name in grants.ROLES:
            session.execute(text(f"DROP OWNED BY {name}"))
            session.execute(text(f"DROP ROLE {name}"))


def test_every_table_is_granted_or_refused_by_name() -> None:
    tables = {*Base.metadata.tables, "alembic_version"}
    for role, granted in grants.ROLES.items():
        assert set(granted) == tables, role


@pytest.mark.parametrize(
    ("part", "statement"),
    [
        ("worker", "SELECT key_hash FROM api_keys"),
        ("worker", "SELECT secret FROM webhook_endpoints"),
        ("worker", "SELECT data FROM file_chunks"),
        ("worker", "UPDATE batches SET status = 'completed'"),
        ("worker", "INSERT INTO api_keys (id) VALUES ('x')"),
        ("worker", "SELECT * FROM webhook_deliveries"),
        ("deliver", "SELECT key_hash FROM api_keys"),
        ("deliver", "SELECT body FROM jobs"),
        ("deliver", "UPDATE jobs SET status = 'cancelled'"),
        ("deliver", "UPDATE webhook_endpoints SET url = 'x'"),
        ("deliver", "UPDATE webhook_endpoints SET secret = 'x'"),
        ("deliver", "DELETE FROM webhook_endpoints"),
        ("api", "DELETE FROM api_keys"),
        ("api", "UPDATE alembic_version SET version_num = 'x'"),
        *((part, "CREATE TABLE public.x (i int)") for part in PASSWORDS),
        *((part, "DROP TABLE jobs") for part in PASSWORDS),
        *((part, "CREATE ROLE somebody") for part in PASSWORDS),
    ],
)
def test_a_role_is_refused_what_its_process_does_not_do(
    roles: Roles, part: str, statement: str
) -> None:
    engine = sync_engine_unpooled(roles.urls[part])
    with (
        engine.connect() as connection,
        pytest.raises(ProgrammingError, match=r"permission denied|must be owner"),
    ):
        connection.execute(text(statement))
    engine.dispose()


def test_every_statement_of_maintenance_and_isolation_runs_under_the_workers_role(
    roles: Roles,
) -> None:
    worker = Database(roles.urls["worker"])
    statements: list[Executable] = [
        repository.sweep_expired(),
        caretaking.forget_idempotency_keys(older_than_seconds=1),
        lanes.roll_up(),
        usage.roll_up(),
        counts.roll_up(),
        lease_clock.pulse(lease_seconds=1),
        lease_clock.is_steady(lease_seconds=1),
        maintenance_counts.add("leases_expired", 1),
        lanes.forget_idle_lanes(),
        serving.stop_silent_workers(silent_seconds=1),
        caretaking.sweep_deadlines(grace_seconds=1),
        caretaking.fail_unservable(silent_seconds=1),
        caretaking.purge_due(),
        caretaking.delete_old(older_than_seconds=1),
        caretaking.pushed_counts(),
        serving.foldable_workers(older_than_seconds=1),
        serving.delete_workers(["worker_x"]),
        serving.keep_stats("worker_x", {}),
        lanes.candidates("m", "normal", clock=0.0, lanes=1, per_lane=1),
        caretaking.repush_candidates("m", "normal", repush_after_seconds=1, limit=1),
        # Suspects
        suspects.waiting("m", revision=None, limit=1),
        suspects.let_others_in(("job_x", 1)),
        suspects.claimed_by("job_x", "worker_x"),
        suspects.ended_attempt("job_x", 1),
        suspects.counts(),
    ]
    refused = []
    for statement in statements:
        try:
            with worker.write() as session:
                session.execute(statement)
        except ProgrammingError as exc:
            refused.append(f"{exc.orig} in {str(statement)[:200]}")
    worker.dispose()
    assert refused == []


def test_only_a_process_that_may_delete_removes_deleted_rows(roles: Roles) -> None:
    """The duty `remove_deleted` is in the list of an API process and not in that of a worker."""
    settings = load_settings({}, database_url=roles.urls["worker"], redis_url=roles.jobs.redis_url)
    database, client = roles.jobs.database, redis.Redis.from_url(roles.jobs.redis_url)
    failures = Counter("vdiff_test_failures", "Failures of duties", ["duty"], registry=None)
    for removes_deleted in (True, False):
        publisher = EventPublisher(client, stream_length=10, stream_seconds=10)
        made = Maintenance.from_settings(
            settings, database, client, publisher, failures, removes_deleted=removes_deleted
        )
        assert ("remove_deleted" in {duty.name for duty in made._housekeeping}) is removes_deleted
    client.close()
    worker = sync_engine_unpooled(roles.urls["worker"])
    for statement in (*webhooks.remove_deleted(), *evaluations.remove_deleted()):
        with (
            worker.connect() as connection,
            pytest.raises(ProgrammingError, match="permission denied"),
        ):
            connection.execute(statement)
    worker.dispose()


def test_the_timeouts_are_those_of_the_roles(roles: Roles) -> None:
    """PgBouncer refuses those that a client asks for, so the roles have them."""
    for part, url in roles.urls.items():
        engine = sync_engine_unpooled(url)
        with engine.connect() as connection:
            shown = [
                connection.execute(text(f"SHOW {name}")).scalar_one()
                for name in ("statement_timeout", "idle_in_transaction_session_timeout")
            ]
        engine.dispose()
        assert shown == ["30s", "1min"], part


def test_real_processes_do_their_work_under_their_roles(
    roles: Roles,
    receiver: Receiver,  # noqa: F811
    tmp_path: Path,
) -> None:
    jobs = roles.jobs
    with ExitStack() as stack:
        worker = WorkerProcess(
            jobs,
            tmp_path / "worker.log",
            database_url=roles.urls["worker"],
            served_model_name="vdiff-tiny",
            model=bundled.folder(bundled.DEFAULT_MODEL),
            enable_apd="false",
            sweep_seconds=0.2,
            forget_after_seconds=3600,
        )
        stack.callback(worker.end)
        log = tmp_path / "api.log"
        api = ApiProcess(
            jobs, log, database_url=roles.urls["api"], webhook_allow_private="true", auth="required"
        )
        stack.callback(api.end)
        process = start_deliver(jobs, tmp_path / "deliver.log", database_url=roles.urls["deliver"])
        stack.callback(lambda: (process.kill(), process.wait()))
        worker.wait_ready()
        api.wait_ready()
        client = stack.enter_context(
            httpx.Client(
                base_url=api.url, timeout=120, headers=auth(new_key(jobs, scopes=["admin"]))
            )
        )
        endpoint = {
            "url": f"{receiver.url}/roles",
            "inline_result": True,
            "events": ["job.succeeded", "batch.completed"],
        }
        assert client.post("/v1/webhook_endpoints", json=endpoint).status_code == 201
        job = client.post(
            "/v1/jobs",
            json=chat_job(webhook={"url": f"{receiver.url}/own"}),
            headers={"prefer": "wait=50"},
        )
        assert job.json()["status"] == "succeeded", job.text
        line = json.dumps(
            {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat_job()["body"]}
        )
        form = {"files": {"file": ("in.jsonl", line.encode())}, "data": {"purpose": "batch"}}
        file = client.post("/v1/files", **form).json()  # type: ignore[arg-type]
        batch = client.post(
            "/v1/batches",
            json={"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"},
        )

        def over() -> bool:
            return client.get(f"/v1/batches/{batch.json()['id']}").json()["status"] == "completed"

        eventually(over, seconds=60, what="batch completed")
        evaluation = {
            "dataset": {"bundled": "vdiff-tiny", "limit": 2},
            "template": "{{input}}",
            "graders": [{"type": "exact"}],
            "configurations": [{"name": "c", "model": "vdiff-tiny", "max_tokens": 8}],
        }
        made = client.post("/v1/evaluations", json=evaluation)
        assert made.status_code < 300, made.text
        eventually(
            lambda: (
                client.get(f"/v1/evaluations/{made.json()['id']}").json()["status"] == "completed"
            ),
            seconds=60,
            what="evaluation completed",
        )
        for path in (
            "/v1/usage",
            "/v1/queue",
            "/v1/overview",
            "/v1/keys",
            "/v1/deliveries",
            "/metrics",
            "/health",
        ):
            assert client.get(path).status_code == 200, path
        for path, count in (("/roles", 2), ("/own", 1)):
            assert len(receiver.got(path, count)) >= count
        # What the sweeper does with rows that are due: a lease, a deadline, retention, the ledger.
        for change in (
            "UPDATE jobs SET purge_after = now() - interval '1 s' WHERE status = 'succeeded' AND batch_id IS NULL",
            "UPDATE workers SET last_beat_at = now() - interval '1 day' WHERE state = 'stopped'",
        ):
            with jobs.database.write() as session:
                session.execute(text(change))
        eventually(
            lambda: (
                jobs.execute(text("SELECT count(*) AS n FROM jobs WHERE purged_at IS NOT NULL"))[
                    0
                ].n
                == 1
            ),
            what="purged",
        )
        assert client.delete(f"/v1/jobs/{job.json()['id']}").status_code < 300
        key = client.post("/v1/keys", json={"name": "k"}).json()
        assert client.post(f"/v1/keys/{key['id']}/rotate").status_code == 200
        assert client.post(f"/v1/keys/{key['id']}/revoke").status_code == 200
    for name in ("worker.log", "api.log", "deliver.log"):
        assert "permission denied" not in (tmp_path / name).read_text(errors="replace"), name
        assert not re.search(
            r"duty_failed.*ProgrammingError|ProgrammingError.*duty_failed",
            (tmp_path / name).read_text(errors="replace"),
        )
        assert "InsufficientPrivilege" not in (tmp_path / name).read_text(errors="replace"), name
