"""Keys over real HTTP: who gets in, what each may do, how much, and that nobody sees another's
jobs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import event, text

from api.auth import TRUSTED_SECONDS, Authenticator
from shared.db.session import AsyncDatabase
from shared.errors import NotAuthenticated, TooManyRequests
from shared.keys import tokens
from shared.settings import load_settings
from tests.integration.conftest import ROOT, ApiProcess, Jobs, Served, eventually, new_key
from tests.integration.test_api_jobs import CHAT, QUESTION, chat_job

pytestmark = pytest.mark.integration
OPERATOR = "the operators own key"


def vdiff(served: Served, *arguments: str, code: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    done = subprocess.run(
        [sys.executable, "-m", "vdiff", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **env,
            "VDIFF_DATABASE_URL": served.jobs.database_url,
            "VDIFF_REDIS_URL": served.jobs.redis_url,
        },
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def make_key(served: Served, *options: str) -> str:
    return vdiff(served, "keys", "create", f"k{time.time_ns()}", *options).strip()


def key_id_of(key: str) -> str:
    from shared.keys.tokens import key_id_of as of

    key_id = of(key)
    assert key_id is not None
    return key_id


@pytest.fixture(scope="module")
def guarded(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An API that listens beyond loopback, beside the one of `served`."""
    with ExitStack() as stack:
        api = ApiProcess(
            served.jobs,
            tmp_path_factory.mktemp("guarded") / "api.log",
            host="0.0.0.0",
            api_key=OPERATOR,
        )
        stack.callback(api.end)
        api.wait_ready()
        yield stack.enter_context(httpx.Client(base_url=api.url, timeout=60))


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_beyond_loopback_a_key_is_needed(served: Served, guarded: httpx.Client) -> None:
    for path in ("/v1/jobs", "/v1/models", "/metrics"):
        answer = guarded.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert guarded.get(path, headers=auth("sk-anything")).status_code == 401
    # Before the body is even looked at, and whatever job one asks for.
    assert guarded.post(CHAT, content=b"{").status_code == 401
    assert guarded.get("/v1/jobs/job_x").status_code == 401
    assert guarded.get("/health").status_code == 200
    key = make_key(served)
    job = guarded.post("/v1/jobs", json=chat_job(), headers={**auth(key), "prefer": "wait=30"})
    assert job.json()["status"] == "succeeded"
    assert guarded.get("/v1/models", headers=auth(key)).json()["data"]


def test_the_openai_sdk_gets_its_own_errors(served: Served, guarded: httpx.Client) -> None:
    base = f"{guarded.base_url}/v1"
    with (
        openai.OpenAI(base_url=base, api_key="nope", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(
        base_url=base, api_key=make_key(served, "--scope", "webhooks"), max_retries=0
    ) as client:
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.chat.completions.create(model="vdiff-tiny", messages=QUESTION)
        assert refused.value.code == "insufficient_scope"


def test_on_loopback_any_authorization_is_accepted(served: Served) -> None:
    for header in ("Bearer whatever", "Basic eDp5", "Bearer vdk_0_0"):
        assert served.client.get("/v1/jobs", headers={"authorization": header}).status_code == 200


def test_nobody_sees_another_tenants_jobs(served: Served, guarded: httpx.Client) -> None:
    mine, theirs = auth(make_key(served)), auth(make_key(served))
    once = {"idempotency-key": f"same-{time.time_ns()}"}
    job = guarded.post(
        "/v1/jobs", json=chat_job(), headers={**mine, **once, "prefer": "wait=30"}
    ).json()
    own = f"/v1/jobs/{job['id']}"
    for method, path in [
        ("GET", own),
        ("GET", f"{own}/result"),
        ("GET", f"{own}/events"),
        ("GET", f"{own}/attempts"),
        ("POST", f"{own}/cancel"),
    ]:
        answer = guarded.request(method, path, headers=theirs)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), path
    assert guarded.get("/v1/jobs", headers=theirs).json()["data"] == []
    assert [j["id"] for j in guarded.get("/v1/jobs", headers=mine).json()["data"]] == [job["id"]]
    # Neither by the same idempotency key, nor by an SDK's retry of the same request.
    again = guarded.post("/v1/jobs", json=chat_job(), headers={**theirs, **once}).json()
    retried = guarded.post(
        "/v1/jobs", json=chat_job(), headers={**theirs, "x-stainless-retry-count": "1"}
    ).json()
    assert job["id"] not in (again["id"], retried["id"])
    # Without a key one is the anonymous tenant, on the same database.
    assert served.client.get(own).status_code == 404
    assert served.client.get(own, headers=mine).status_code == 200


def test_nobody_sees_another_tenants_files_and_batches(
    served: Served, guarded: httpx.Client
) -> None:
    mine, theirs = auth(make_key(served)), auth(make_key(served))
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": chat_job()["body"]}
    form = {
        "files": {"file": ("in.jsonl", json.dumps(line).encode())},
        "data": {"purpose": "batch"},
    }
    file = guarded.post("/v1/files", headers=mine, **form).json()  # type: ignore[arg-type]
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
    once = {"idempotency-key": f"same-{time.time_ns()}"}
    batch = guarded.post("/v1/batches", json=body, headers={**mine, **once}).json()
    own_file, own_batch = f"/v1/files/{file['id']}", f"/v1/batches/{batch['id']}"

    def over() -> Any:
        shown = guarded.get(own_batch, headers=mine).json()
        return shown if shown["status"] == "completed" else None

    output = f"/v1/files/{eventually(over)['output_file_id']}"
    for method, path, code in [
        ("GET", own_file, "file_not_found"),
        ("GET", f"{own_file}/content", "file_not_found"),
        ("DELETE", own_file, "file_not_found"),
        ("GET", output, "file_not_found"),
        ("GET", f"{output}/content", "file_not_found"),
        ("GET", own_batch, "batch_not_found"),
        ("GET", f"{own_batch}/items", "batch_not_found"),
        ("GET", f"{own_batch}/events", "batch_not_found"),
        ("POST", f"{own_batch}/cancel", "batch_not_found"),
        ("POST", f"{own_batch}/retry_failed", "batch_not_found"),
    ]:
        answer = guarded.request(method, path, headers=theirs)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code), (
            path,
            answer.text,
        )
    for path in ("/v1/files", "/v1/batches"):
        assert guarded.get(path, headers=theirs).json()["data"] == []
    # Another's file is no input, neither by name nor under the same idempotency key.
    stolen = guarded.post("/v1/batches", json=body, headers={**theirs, **once})
    assert (stolen.status_code, stolen.json()["error"]["param"]) == (404, "input_file_id")
    assert guarded.get(f"{own_file}/content", headers=mine).content == json.dumps(line).encode()
    assert (
        served.client.get(own_file).status_code == 404
    )  # without a key one is the anonymous tenant


def test_keys_of_one_tenant_share_its_jobs(served: Served, guarded: httpx.Client) -> None:
    tenant = f"team-{time.time_ns()}"
    first, second = (auth(make_key(served, "--tenant", tenant)) for _ in range(2))
    job = guarded.post("/v1/jobs", json=chat_job(), headers=first).json()
    assert guarded.get(f"/v1/jobs/{job['id']}", headers=second).status_code == 200


def test_revoke_and_rotate(served: Served, guarded: httpx.Client) -> None:
    key = make_key(served)
    assert guarded.get("/v1/models", headers=auth(key)).status_code == 200
    fresh = vdiff(served, "keys", "rotate", key_id_of(key)).strip()
    assert guarded.get("/v1/models", headers=auth(fresh)).status_code == 200
    assert guarded.get("/v1/models", headers=auth(key)).status_code == 200  # for a day
    last = vdiff(served, "keys", "rotate", key_id_of(key), "--grace-seconds", "0").strip()
    assert guarded.get("/v1/models", headers=auth(last)).status_code == 200
    assert guarded.get("/v1/models", headers=auth(fresh)).status_code == 401
    vdiff(served, "keys", "revoke", key_id_of(key))
    eventually(lambda: guarded.get("/v1/models", headers=auth(last)).status_code == 401)
    for command in ("revoke", "rotate"):
        assert "was revoked before" in vdiff(served, "keys", command, key_id_of(key), code=1)
        assert "no key 'key_none'; `vdiff keys list` has all" in vdiff(
            served, "keys", command, "key_none", code=5
        )


def test_keys_are_managed_over_http_within_their_tenant(
    served: Served, guarded: httpx.Client
) -> None:
    tenant = f"team-{time.time_ns()}"
    admin = auth(new_key(served.jobs, tenant=tenant, scopes=["admin"]))
    other = auth(new_key(served.jobs, scopes=["admin"]))
    plain = auth(new_key(served.jobs, tenant=tenant))
    for method, path in [
        ("GET", ""),
        ("POST", ""),
        ("GET", "/key_x"),
        ("POST", "/key_x/rotate"),
        ("POST", "/key_x/revoke"),
    ]:
        answer = guarded.request(method, f"/v1/keys{path}", headers=plain)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            403,
            "insufficient_scope",
        ), path
    answer = guarded.post("/v1/keys", json={"name": "made", "scopes": ["jobs"]}, headers=admin)
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/keys/{made['id']}")
    assert (made["tenant"], made["scopes"], made["state"], made["weight"]) == (
        tenant,
        ["jobs"],
        "good",
        1,
    )
    mine = auth(made["key"])
    who = guarded.get("/v1/keys/self", headers=mine).json()
    assert (who["tenant"], who["scopes"], who["key"]["id"]) == (tenant, ["jobs"], made["id"])
    listed = guarded.get("/v1/keys", headers=admin).json()["data"]
    assert made["id"] in [k["id"] for k in listed] and {k["tenant"] for k in listed} == {tenant}
    assert not any("key" in k or "key_hash" in k or "webhook_secret" in k for k in listed)
    first = guarded.get("/v1/keys?limit=1", headers=admin).json()
    second = guarded.get(f"/v1/keys?limit=1&cursor={first['next_cursor']}", headers=admin).json()
    assert [first["data"][0]["id"], second["data"][0]["id"]] == [k["id"] for k in listed[:2]]
    for method, path in [
        ("GET", ""),
        ("POST", "/rotate"),
        ("POST", "/revoke"),
    ]:  # another tenant's is 404
        assert (
            guarded.request(method, f"/v1/keys/{made['id']}{path}", headers=other).status_code
            == 404
        )
    assert made["id"] not in [
        k["id"] for k in guarded.get("/v1/keys", headers=other).json()["data"]
    ]
    assert (
        guarded.get("/v1/models", headers=auth(made["key"])).status_code == 200
    )  # its row is trusted for a second
    rotated = guarded.post(
        f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 0}, headers=admin
    ).json()
    assert guarded.get("/v1/models", headers=auth(rotated["key"])).status_code == 200  # at once
    assert guarded.get("/v1/models", headers=mine).status_code == 401
    revoked = guarded.post(f"/v1/keys/{made['id']}/revoke", headers=admin).json()
    assert revoked["state"] == "revoked" and revoked["revoked_at"]
    eventually(lambda: guarded.get("/v1/models", headers=auth(rotated["key"])).status_code == 401)
    again = guarded.post(f"/v1/keys/{made['id']}/rotate", headers=admin)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "key_revoked")


def test_a_key_gives_no_more_than_it_has_and_the_operator_anything(
    served: Served, guarded: httpx.Client
) -> None:
    tenant = f"team-{time.time_ns()}"
    strong = new_key(served.jobs, tenant=tenant, scopes=["admin"], requests_per_minute=900)
    small = auth(new_key(served.jobs, tenant=tenant, scopes=["admin"], requests_per_minute=300))
    for more, param in [
        ({"tenant": "another"}, "tenant"),
        ({"requests_per_minute": 301}, "requests_per_minute"),
        ({"weight": 2}, "weight"),
    ]:
        answer = guarded.post("/v1/keys", json={"name": "x", **more}, headers=small)
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, param)
    made = guarded.post("/v1/keys", json={"name": "x"}, headers=small).json()
    assert made["requests_per_minute"] == 300
    # To rotate a key is to hold it.
    assert guarded.post(f"/v1/keys/{key_id_of(strong)}/rotate", headers=small).status_code == 403
    assert guarded.post(f"/v1/keys/{made['id']}/rotate", headers=small).status_code == 200
    free = {
        "name": "y",
        "tenant": f"new-{tenant}",
        "requests_per_minute": 5000,
        "weight": 9,
        "scopes": ["admin"],
    }
    answer = guarded.post("/v1/keys", json=free, headers=auth(OPERATOR))
    assert answer.status_code == 201 and free.items() <= answer.json().items()
    ids = [
        k["id"] for k in guarded.get("/v1/keys?limit=100", headers=auth(OPERATOR)).json()["data"]
    ]
    assert {made["id"], answer.json()["id"], key_id_of(strong)} <= set(ids)


def test_bad_keys_write_nothing_and_cost_a_bounded_number_of_transactions(jobs: Jobs) -> None:
    """Each statement outside a transaction is one of its own; the reads here are such."""
    good = new_key(jobs)
    victim = key_id_of(good)
    statements: list[str] = []

    async def count(
        authenticator: Authenticator, key: str, address: str = "192.0.2.1"
    ) -> tuple[int, str]:
        statements.clear()
        try:
            outcome = (await authenticator.principal(key, None, address)).tenant
        except (NotAuthenticated, TooManyRequests) as exc:
            outcome = exc.code
        return len(statements), outcome

    async def run() -> None:
        database = AsyncDatabase(jobs.database_url)
        event.listen(
            database.engine.sync_engine, "before_cursor_execute", lambda *a: statements.append(a[2])
        )
        try:
            settings = load_settings({"VDIFF_AUTH": "required"})
            found = Authenticator(database, settings)
            wrong = [tokens.new_key(victim) for _ in range(100)]
            assert await count(found, wrong[0]) == (1, "invalid_api_key")
            assert await count(found, wrong[0]) == (
                0,
                "invalid_api_key",
            )  # a moment ago it was refused
            assert jobs.execute(text("SELECT last_used_at FROM api_keys"))[0].last_used_at is None
            costs = [await count(found, key) for key in wrong]
            assert sum(cost for cost, _ in costs) <= 20
            assert costs[-1] == (0, "rate_limit_exceeded")
            # A key that this process knows is not concerned, also when its row has to be read
            # again.
            assert await count(found, good, "192.0.2.2") == (
                2,
                (await found.principal(good)).tenant,
            )
            for _ in range(3):
                assert (await count(found, good))[0] == 0
            read_at, row = found._rows[victim]
            found._rows[victim] = (read_at - TRUSTED_SECONDS, row)
            assert (await count(found, good))[
                0
            ] == 1  # read, not written: it was used within a minute
            # Neither an id that does not exist nor a text that is no key writes or stays in memory
            # for long.
            assert (await count(found, tokens.new_key(tokens.new_key_id()), "192.0.2.3"))[0] == 1
            assert await count(found, "sk-none", "192.0.2.3") == (0, "invalid_api_key")
            assert len(found._rows) == 1
        finally:
            await database.dispose()

    asyncio.run(run())
    assert jobs.execute(text("SELECT last_used_at FROM api_keys"))[0].last_used_at is not None


def test_a_flood_of_bad_keys_is_429_and_known_keys_go_on(served: Served, tmp_path: Any) -> None:
    good = auth(new_key(served.jobs))
    api = ApiProcess(served.jobs, tmp_path / "api.log", auth="required")
    try:
        api.wait_ready()
        assert httpx.get(f"{api.url}/v1/models", headers=good).status_code == 200
        answers = [
            httpx.get(f"{api.url}/v1/models", headers=auth(f"sk-guess-{i}")) for i in range(60)
        ]
        assert {a.status_code for a in answers} == {401, 429}
        refused = next(a for a in answers if a.status_code == 429)
        assert (
            int(refused.headers["retry-after"]) >= 1
            and "unknown API keys" in refused.json()["detail"]
        )
        assert httpx.get(f"{api.url}/v1/models", headers=good).status_code == 200
    finally:
        api.end()


def test_an_expired_key_is_none(served: Served, guarded: httpx.Client) -> None:
    assert (
        guarded.get("/v1/models", headers=auth(make_key(served, "--expires-days", "0"))).status_code
        == 401
    )


def test_keys_are_stored_hashed_and_listed_without(served: Served) -> None:
    key = make_key(served)
    with served.jobs.database.read() as session:
        row = session.execute(
            text("SELECT k::text AS all FROM api_keys k WHERE id = :id"), {"id": key_id_of(key)}
        ).one()
    assert key not in row.all
    assert key.rpartition("_")[2] not in row.all
    listed = [json.loads(line) for line in vdiff(served, "keys", "list", "--json").splitlines()]
    assert key_id_of(key) in [k["id"] for k in listed]
    assert not {"key_hash", "webhook_secret"} & set(listed[0])
    assert key not in vdiff(served, "keys", "list")
    made = json.loads(vdiff(served, "keys", "create", "[/red] for programs", "--json"))
    assert made["key"].startswith("vd") and made["id"] in vdiff(served, "keys", "list")
    assert "[/red] for programs" in vdiff(served, "keys", "list")
    rotated = json.loads(vdiff(served, "keys", "rotate", made["id"], "--json"))
    assert rotated["id"] == made["id"] and rotated["key"] != made["key"]
    assert json.loads(vdiff(served, "keys", "revoke", made["id"], "--json")) == {
        "id": made["id"],
        "revoked": True,
    }


@pytest.mark.parametrize(
    "options",
    [
        ("create", "x", "--max-queued-jobs", "99999999999"),
        ("create", "x", "--expires-days", "1e10"),
        ("create", "x", "--expires-days", "nan"),
        ("rotate", "key_x", "--grace-seconds", "inf"),
        ("create", ""),
    ],
)
def test_bad_options_are_a_line_and_no_parameters_of_a_statement(
    served: Served, options: tuple[str, ...]
) -> None:
    env = {**os.environ, "VDIFF_DATABASE_URL": served.jobs.database_url}
    done = subprocess.run(
        [sys.executable, "-m", "vdiff", "keys", *options],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "whsec" not in done.stderr, (
        done.stderr
    )


def test_requests_per_minute(served: Served, guarded: httpx.Client) -> None:
    key = auth(make_key(served, "--requests-per-minute", "3"))
    answers = [guarded.get("/v1/models", headers=key) for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert answers[0].headers["ratelimit"].startswith('"requests";r=2;t=')
    last = answers[-1]
    assert (last.json()["error"]["code"], last.json()["error"]["type"]) == (
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert 1 <= int(last.headers["retry-after"]) <= 120
    assert (
        guarded.get("/v1/models", headers=auth(make_key(served))).status_code == 200
    )  # another key is not concerned
    assert "ratelimit" not in served.client.get("/v1/models").headers  # who has no limit


def test_requests_are_limited_without_redis_too(served: Served, tmp_path: Any) -> None:
    key = auth(make_key(served, "--requests-per-minute", "2"))
    api = ApiProcess(served.jobs, tmp_path / "api.log", redis_url="redis://127.0.0.1:1/0")
    try:
        api.wait_ready()
        codes = [
            httpx.get(f"{api.url}/v1/models", headers=key, timeout=120).status_code
            for _ in range(3)
        ]
    finally:
        api.end()
    assert codes == [200, 200, 429]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "[::ffff:1.2.3.4]",
        "[",
        "10.0.0.1",
    ],
)
def test_a_name_that_was_pointed_here_is_no_loopback(served: Served, host: str) -> None:
    """DNS rebinding: the page's origin is then this server's, and no key is needed."""
    for method, path in (("POST", "/v1/keys"), ("GET", "/v1/jobs"), ("GET", "/metrics")):
        answer = served.client.request(
            method, path, headers={"host": host, "authorization": "Bearer x"}
        )
        assert answer.status_code in (400, 403), path  # h11 itself refuses what is no host
        if answer.status_code == 403:
            assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
                "host_not_allowed",
                "Host",
            )
    key = auth(make_key(served))
    assert (
        served.client.get("/v1/jobs", headers={"host": "proxy.example", **key}).status_code == 200
    )
    for name in ("localhost:1", "vdiff.localhost", "[::1]:80"):
        assert served.client.get("/v1/jobs", headers={"host": name}).status_code == 200


def away_job(**body: Any) -> dict[str, Any]:
    return chat_job(body={"model": "limits-away", **body})


def test_queued_jobs_and_tokens_are_limited(served: Served, guarded: httpx.Client) -> None:
    from shared import serving
    from shared.model_card import ModelCard

    with served.jobs.database.write() as session:
        row = session.execute(serving.get_model("vdiff-tiny")).one()
        card = ModelCard.from_json({**row.card, "name": "limits-away"})
        session.execute(serving.register_model(card, row.tokenizer_files))
    key = auth(make_key(served, "--max-queued-jobs", "2"))
    eventually(lambda: guarded.post("/v1/jobs", json=away_job(), headers=key).status_code == 202)
    answers = [guarded.post("/v1/jobs", json=away_job(), headers=key) for _ in range(2)]
    assert [a.status_code for a in answers] == [202, 429]
    assert int(answers[1].headers["retry-after"]) <= 120
    key = auth(make_key(served, "--max-queued-jobs", "5"))
    with ThreadPoolExecutor(24) as pool:  # at once, and no more than that
        codes = list(
            pool.map(
                lambda _: guarded.post("/v1/jobs", json=away_job(), headers=key).status_code,
                range(60),
            )
        )
    assert (codes.count(202), codes.count(429)) == (5, 55)
    key = auth(make_key(served, "--max-queued-tokens", "100"))
    assert guarded.post("/v1/jobs", json=away_job(max_tokens=40), headers=key).status_code == 202
    full = guarded.post("/v1/jobs", json=away_job(max_tokens=80), headers=key)
    assert (full.status_code, "tokens" in full.json()["detail"]) == (429, True)
    evaluation = {
        "dataset": {"bundled": "vdiff-tiny", "limit": 9},
        "template": "{{input}}",
        "graders": [{"type": "exact"}],
        "configurations": [{"name": "c", "model": "limits-away", "max_tokens": 16}],
    }
    full = guarded.post("/v1/evaluations", json=evaluation, headers=key)
    assert (full.status_code, "tokens" in full.json()["detail"]) == (429, True)


def test_another_life_of_a_batchs_lines_is_queued_within_the_limits(
    served: Served, guarded: httpx.Client
) -> None:
    key = auth(make_key(served, "--max-queued-jobs", "3"))
    lines = [
        {
            "custom_id": f"{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": away_job()["body"],
        }
        for i in range(2)
    ]
    content = "".join(json.dumps(one) + "\n" for one in lines)
    file = guarded.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("f", content)}, headers=key
    ).json()
    body = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    made = guarded.post("/v1/batches", json=body, headers=key).json()
    batch = f"/v1/batches/{made['id']}"
    eventually(lambda: guarded.get(batch, headers=key).json()["vdiff"]["stored"] == 2)
    guarded.post(f"{batch}/cancel", headers=key)
    eventually(lambda: guarded.get(batch, headers=key).json()["status"] == "cancelled")
    for _ in range(2):
        job = guarded.post("/v1/jobs", json=away_job(), headers=key)
        assert job.status_code == 202
    full = guarded.post(f"{batch}/retry_failed", headers=key)
    assert (
        full.status_code,
        "2 jobs are queued, this would add 2, and 3 may be" in full.json()["detail"],
    ) == (
        429,
        True,
    )
    assert guarded.get(batch, headers=key).json()["status"] == "cancelled"  # as it was
    guarded.post(f"/v1/jobs/{job.json()['id']}/cancel", headers=key)
    assert guarded.post(f"{batch}/retry_failed", headers=key).json()["retried"] == 2
    guarded.post(
        f"{batch}/cancel", headers=key
    )  # nobody serves its model; other tests count what is open
    eventually(lambda: guarded.get(batch, headers=key).json()["status"] == "cancelled")


def test_a_static_key_may_everything(served: Served, tmp_path: Any) -> None:
    api = ApiProcess(served.jobs, tmp_path / "api.log", api_key="open-sesame")
    try:
        api.wait_ready()
        assert httpx.get(f"{api.url}/v1/jobs").status_code == 401
        assert httpx.get(f"{api.url}/v1/jobs", headers=auth("open-sesam")).status_code == 401
        for path in ("/v1/jobs", "/metrics"):
            assert httpx.get(f"{api.url}{path}", headers=auth("open-sesame")).status_code == 200
        assert httpx.get(f"{api.url}/metrics", headers=auth(make_key(served))).status_code == 403
        assert (
            httpx.get(
                f"{api.url}/metrics", headers=auth(make_key(served, "--scope", "admin"))
            ).status_code
            == 200
        )
    finally:
        api.end()
    assert "open-sesame" not in api.log.read_text()


def test_evaluations_are_their_tenants(served: Served, guarded: httpx.Client) -> None:
    one, other = make_key(served), make_key(served)
    configuration = {"name": "c", "model": "vdiff-tiny", "max_tokens": 4}
    body = {
        "dataset": {"bundled": "vdiff-tiny", "limit": 2},
        "template": "{{input}}",
        "graders": [{"type": "exact"}],
        "configurations": [configuration],
    }
    made = guarded.post("/v1/evaluations", json=body, headers=auth(one)).json()
    own = f"/v1/evaluations/{made['id']}"
    side = {"evaluation": made["id"], "configuration": "c"}
    for method, path, content in (
        ("GET", own, None),
        ("GET", f"{own}/items", None),
        ("POST", f"{own}/cancel", None),
        ("DELETE", own, None),
        ("POST", f"{own}/configurations", {"configurations": [configuration]}),
        ("POST", "/v1/evaluations/compare", {"first": side, "second": side}),
    ):
        answer = guarded.request(method, path, json=content, headers=auth(other))
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            404,
            "evaluation_not_found",
        ), path
    assert guarded.get("/v1/evaluations", headers=auth(other)).json()["data"] == []
    assert [e["id"] for e in guarded.get("/v1/evaluations", headers=auth(one)).json()["data"]] == [
        made["id"]
    ]
    # The same content is another tenant's own evaluation.
    assert guarded.post("/v1/evaluations", json=body, headers=auth(other)).status_code == 201
    only_jobs = make_key(served, "--scope", "jobs")
    assert (
        guarded.get("/v1/evaluations", headers=auth(only_jobs)).json()["error"]["code"]
        == "insufficient_scope"
    )
