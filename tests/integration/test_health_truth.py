"""Health during faults: a full Redis, a replica and a read-only PostgreSQL are not ok, and the
remedy is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy import make_url, text

from shared import health
from shared.db.session import sync_engine_unpooled
from tests.integration.conftest import ApiProcess, Jobs, eventually, jobs_with_database
from vdiff.doctor import Check, examine
from vdiff.embedded import EmbeddedRedis
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
Stack = tuple[Jobs, ApiProcess, redis.Redis]


@pytest.fixture(scope="module")
def stack(
    postgres_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("health")
    with ExitStack() as exits:
        server = EmbeddedRedis(folder / "redis")
        exits.callback(server.stop)
        url = server.start()
        jobs = jobs_with_database(postgres_url, url, migrated_template, exits)
        api = ApiProcess(jobs, folder / "api.log")
        exits.callback(api.end)
        api.wait_ready(path="/health")
        jobs.execute(
            text(
                "INSERT INTO models (name, card, tokenizer_files, tokenizer_hash) VALUES ('m', '{}', '{}', 'h') RETURNING name"
            )
        )
        admin = redis.Redis.from_url(url)
        exits.callback(admin.close)
        yield jobs, api, admin


def get(api: ApiProcess, path: str) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(api.url + path, timeout=120)
    return answer.status_code, answer.json()


def doctor(stack: Stack, name: str) -> list[Check]:
    from shared.settings import load_settings

    jobs, api, _ = stack
    settings = load_settings(
        {}, database_url=jobs.database_url, redis_url=jobs.redis_url, base_url=api.url
    )
    return [check for check in examine(settings) if check.name == name and check.state == "bad"]


FAULTS: dict[str, tuple[Callable[[redis.Redis], Any], Callable[[redis.Redis], Any], str, str]] = {
    "full": (
        lambda r: r.config_set("maxmemory", "1"),
        lambda r: r.config_set("maxmemory", "0"),
        "full",
        "maxmemory",
    ),
    "replica": (
        lambda r: r.execute_command("REPLICAOF", "127.0.0.1", str(free_port())),
        lambda r: r.execute_command("REPLICAOF", "NO", "ONE"),
        "replica",
        "master",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_redis_that_takes_no_writes(stack: Stack, fault: str) -> None:
    _, api, admin = stack
    begin, end, word, remedy = FAULTS[fault]
    eventually(lambda: get(api, "/health/ready")[1]["status"] == "ready", what="well before")
    begin(admin)
    try:
        eventually(lambda: get(api, "/health")[1]["redis"] != "ok", what="noticed")
        code, shown = get(api, "/health")
        assert (code, shown["status"], shown["database"]) == (200, "degraded", "ok")
        assert word in shown["redis"] and remedy in shown["redis"]
        code, shown = get(api, "/health/ready")
        assert (code, shown["status"]) == (200, "degraded") and word in shown["reason"]
        assert get(api, "/health/live") == (200, {"status": "ok"})
        (found,) = doctor(stack, "redis")
        assert word in found.text and remedy in str(found.advice)
        (problem,) = get(api, "/v1/overview")[1]["problems"]
        assert problem == {
            "part": "redis",
            "text": found.text.removeprefix("redis: "),
            "advice": found.advice,
        }
    finally:
        end(admin)
    eventually(lambda: get(api, "/health/ready")[1]["status"] == "ready", what="well again")
    assert doctor(stack, "redis") == []
    assert get(api, "/v1/overview")[1]["problems"] == []


def test_postgresql_that_takes_no_writes(stack: Stack, postgres_url: str) -> None:
    jobs, api, _ = stack
    name = make_url(jobs.database_url).database
    engine = sync_engine_unpooled(postgres_url).execution_options(isolation_level="AUTOCOMMIT")

    def read_only(value: str) -> None:
        with engine.connect() as connection:
            connection.execute(
                text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}')
            )
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                ),
                {"name": name},
            )

    read_only("on")
    try:
        eventually(lambda: "read-only" in get(api, "/health")[1]["database"], what="noticed")
        code, shown = get(api, "/health")
        assert (code, shown["status"]) == (503, "down") and "primary" in shown["database"]
        code, shown = get(api, "/health/ready")
        assert code == 503 and "read-only" in shown["reason"]
        assert get(api, "/health/live") == (200, {"status": "ok"})
        (found,) = doctor(stack, "database")
        assert "read-only" in found.text and found.advice == health.READ_ONLY.advice
        (problem,) = get(api, "/v1/overview")[1]["problems"]
        assert problem == {
            "part": "database",
            "text": health.READ_ONLY.text,
            "advice": health.READ_ONLY.advice,
        }
    finally:
        read_only("off")
    eventually(lambda: get(api, "/health/ready")[1]["status"] == "ready", what="well again")
    assert doctor(stack, "database") == []
