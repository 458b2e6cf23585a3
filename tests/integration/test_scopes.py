"""The routes that each scope opens: every route of the application, called with a key of each scope
alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.errors import paths
from shared.keys.principal import Scope
from shared.settings import load_settings
from tests.integration.conftest import ApiProcess, Served, eventually, new_key
from tests.integration.test_api_jobs import CHAT, chat_job
from tests.integration.test_api_keys import auth

pytestmark = pytest.mark.integration

PUBLIC = {"/health", "/health/live", "/health/ready", "/version"}
ANY_KEY = {
    "/v1/models",
    "/v1/models/{name}",
    "/v1/keys/self",
    "/v1/overview",
    "/v1/overview/events",
    "/v1/rules",
    "/v1/queue",
    "/v1/usage",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
}
SCOPES_BY_PREFIX = {
    "/v1/jobs": {Scope.JOBS},
    "/v1/chat/completions": {Scope.JOBS},
    "/v1/completions": {Scope.JOBS},
    "/v1/responses": {Scope.JOBS},
    "/v1/infill": {Scope.JOBS},
    "/v1/loglikelihood": {Scope.JOBS},
    "/v1/files": {Scope.BATCHES},
    "/v1/batches": {Scope.BATCHES},
    "/v1/evaluations": {Scope.BATCHES},
    "/v1/webhook_event_types": {Scope.WEBHOOKS},
    "/v1/webhook_endpoints": {Scope.WEBHOOKS},
    "/v1/deliveries": {Scope.WEBHOOKS},
    "/v1/webhook_secret": {Scope.JOBS, Scope.WEBHOOKS},
    "/v1/keys": set(),
    "/metrics": set(),
}


def expected_scopes(path: str) -> set[Scope] | None:
    """Return the scopes that open a path, besides `admin`; None where any key does."""
    if path in PUBLIC | ANY_KEY:
        return None
    found = [
        scopes for prefix, scopes in SCOPES_BY_PREFIX.items() if f"{path}/".startswith(f"{prefix}/")
    ]
    assert len(found) == 1, f"{path}: say in this table which scopes open it"
    return found[0]


@pytest.fixture(scope="module")
def keyed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An API that needs keys, beside the one of `served`."""
    with ExitStack() as stack:
        log = tmp_path_factory.mktemp("scopes") / "api.log"
        api = ApiProcess(served.jobs, log, auth="required", webhook_allow_private="true")
        stack.callback(api.end)
        api.wait_ready()
        yield stack.enter_context(httpx.Client(base_url=api.url, timeout=60))


def status_of(
    client: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> tuple[int, str]:
    """Send a request that does nothing and return its status and error code; streams are not read."""
    body = (
        {}
        if method in ("GET", "DELETE")
        else {"content": b"[]", "headers": {"content-type": "application/json"}}
    )
    sent = {**body, "headers": {**body.get("headers", {}), **headers}}  # type: ignore[dict-item]
    with client.stream(method, path, **sent) as answer:  # type: ignore[arg-type]
        if answer.status_code < 400 or "json" not in answer.headers.get("content-type", ""):
            return answer.status_code, ""
        return answer.status_code, json.loads(answer.read()).get("error", {}).get("code") or ""


def routes(served: Served) -> list[tuple[str, str]]:
    app = create_app(
        load_settings(
            {
                "VDIFF_DATABASE_URL": served.jobs.database_url,
                "VDIFF_REDIS_URL": served.jobs.redis_url,
            }
        )
    )
    return sorted((method, path) for path, methods in paths(app).items() for method in methods)


@pytest.mark.parametrize("scope", list(Scope))
def test_a_scope_opens_its_routes_and_no_others(
    served: Served, keyed: httpx.Client, scope: Scope
) -> None:
    headers = auth(new_key(served.jobs, scopes=[scope.value]))
    wrong = []
    found = routes(served)
    assert len(found) > 60
    for method, path in found:
        scopes = expected_scopes(path)
        opened = scopes is None or scope in scopes or scope is Scope.ADMIN
        status, code = status_of(keyed, method, path.replace("{", "x").replace("}", ""), headers)
        refused = (status, code) == (403, "insufficient_scope")
        if refused == opened or status == 401:
            wrong.append((method, path, status, code))
    assert wrong == []


def test_every_route_but_the_public_ones_needs_a_key(served: Served, keyed: httpx.Client) -> None:
    wrong = []
    for method, path in routes(served):
        status, _ = status_of(keyed, method, path.replace("{", "x").replace("}", ""), {})
        if (status == 401) == (path in PUBLIC):
            wrong.append((method, path, status))
    assert wrong == []


def test_no_scope_reads_texts_that_are_not_its_own(served: Served, keyed: httpx.Client) -> None:
    """Every GET route, with real ids: a job's prompt shows to `jobs` alone, a batch's to `batches`."""
    tenant = f"team-{time.time_ns()}"
    owner = auth(new_key(served.jobs, tenant=tenant))
    secrets = {"job": f"canary-job-{time.time_ns()}", "batch": f"canary-batch-{time.time_ns()}"}
    bodies = {
        name: {**chat_job()["body"], "messages": [{"role": "user", "content": text}]}
        for name, text in secrets.items()
    }
    receiver = {"url": "http://127.0.0.1:9/x", "inline_result": True}
    endpoint = keyed.post("/v1/webhook_endpoints", json=receiver, headers=owner).json()
    job = keyed.post(
        "/v1/jobs", json=chat_job(body=bodies["job"]), headers={**owner, "prefer": "wait=30"}
    ).json()
    assert job["status"] == "succeeded"
    line = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": bodies["batch"]})
    form: Any = {"files": {"file": ("in.jsonl", line.encode())}, "data": {"purpose": "batch"}}
    file = keyed.post("/v1/files", headers=owner, **form).json()
    given = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
    batch = keyed.post("/v1/batches", json=given, headers=owner).json()
    eventually(
        lambda: (
            keyed.get(f"/v1/batches/{batch['id']}", headers=owner).json()["status"] == "completed"
        ),
        what="batch completed",
    )
    deliveries = keyed.get("/v1/deliveries", headers=owner).json()["data"]
    ids = {
        "job_id": job["id"],
        "batch_id": batch["id"],
        "file_id": file["id"],
        "endpoint_id": endpoint["id"],
        "delivery_id": deliveries[0]["id"],
        "name": served.model,
    }
    allowed = {Scope.JOBS: {"job"}, Scope.BATCHES: {"batch"}, Scope.WEBHOOKS: set()}
    for scope, may_read in allowed.items():
        headers = auth(new_key(served.jobs, tenant=tenant, scopes=[scope.value]))
        seen: set[str] = set()
        for method, path in routes(served):
            if method != "GET" or path.endswith("/events"):
                continue
            for name, value in ids.items():
                path = path.replace("{" + name + "}", value)
            answer = keyed.get(path, headers=headers)
            seen |= {name for name, text in secrets.items() if text in answer.text}
        assert seen == may_read, scope


def test_usage_of_other_keys_needs_a_scope_that_reads_work(
    served: Served, keyed: httpx.Client
) -> None:
    tenant = f"team-{time.time_ns()}"
    owner = new_key(served.jobs, tenant=tenant)
    done = keyed.post(
        "/v1/jobs", json=chat_job(), headers={**auth(owner), "prefer": "wait=30"}
    ).json()
    assert done["status"] == "succeeded"
    watcher = auth(new_key(served.jobs, tenant=tenant, scopes=["webhooks"]))
    assert keyed.get("/v1/usage", headers=watcher).json()["data"] == []
    refused = keyed.get("/v1/usage", params={"key_id": "key_other"}, headers=watcher)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "key_id")
    reader = auth(new_key(served.jobs, tenant=tenant, scopes=["jobs"]))
    assert keyed.get("/v1/usage", headers=reader).json()["total"]["jobs"]["total"] == 1
