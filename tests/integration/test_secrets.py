"""Webhook secrets at rest: nothing readable in the database, clear ones migrated, keys rotated,
receivers unaffected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from shared.errors import ConfigurationError
from shared.settings import load_settings
from shared.vault import CLEAR, Vault, id_of, new_key
from shared.webhooks import repository as webhooks
from shared.webhooks import stored_secrets
from shared.webhooks.secrets import new_secret
from tests.integration.conftest import ROOT, ApiProcess, Jobs
from tests.integration.conftest import new_key as new_api_key
from tests.integration.test_api_keys import auth
from worker.delivery import Sender

pytestmark = pytest.mark.integration
TABLES = ("api_keys", "webhook_endpoints", "webhook_secrets")


def vdiff(jobs: Jobs, *arguments: str, secret_keys: str, code: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env |= {"VDIFF_DATABASE_URL": jobs.database_url, "VDIFF_SECRET_KEYS": secret_keys}
    done = subprocess.run(
        [sys.executable, "-m", "vdiff", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def stored(jobs: Jobs) -> str:
    """Everything in the tables that hold secrets, as text."""
    return "\n".join(
        row.all
        for table in TABLES
        for row in jobs.execute(text(f"SELECT t::text AS all FROM {table} t"))
    )


class SentHeaders(Sender):
    """A sender that keeps what it would send."""

    sent: tuple[bytes, dict[str, str]] | None = None

    def _send(self, target: Any, addresses: Any, body: bytes, headers: dict[str, str]) -> Any:
        self.sent = (body, headers)
        return super()._send(target, ["127.0.0.1"], body, headers)


def sign_one(jobs: Jobs, endpoint_id: str, tenant: str, keys: str) -> tuple[bytes, dict[str, str]]:
    """Have a sender with these keys make the next attempt of a test event."""
    event_id = f"evt_{id(object())}{len(keys)}"
    event, delivery = webhooks.add_test(event_id, endpoint_id, tenant, "webhook.test")
    with jobs.database.write() as session:
        session.execute(event)
        delivery_id = session.execute(delivery).scalar_one()
    settings = load_settings(
        {}, secret_keys=keys, webhook_allow_private=True, webhook_timeout_seconds=1.0
    )
    sender = SentHeaders(jobs.database, settings)
    try:
        sender.deliver(delivery_id)
    finally:
        sender.close()
    assert sender.sent is not None
    return sender.sent


@pytest.fixture
def old_and_new() -> Iterator[tuple[str, str]]:
    yield new_key(), new_key()


def test_clear_secrets_are_encrypted_and_keys_rotated(
    jobs: Jobs, old_and_new: tuple[str, str]
) -> None:
    old, new = old_and_new
    secret, before = new_secret(), new_secret()
    with jobs.database.write() as session:
        values = {
            "id": "we_1",
            "tenant": "t",
            "url": "http://127.0.0.1:9/x",
            "events": ["job.failed"],
        }
        session.execute(webhooks.create_endpoint({**values, "secret": before}))
        session.execute(webhooks.rotate_secret("we_1", "t", secret, grace_seconds=3600))
        session.execute(webhooks.ensure_secret("t", new_secret()))
    new_api_key(jobs)
    assert stored(jobs).count("whsec_") == 4
    assert stored_secrets.reseal(jobs.database, Vault([old])) == 4
    assert "whsec_" not in stored(jobs) and stored(jobs).count(f"fernet:{id_of(old)}:") == 4
    assert stored_secrets.reseal(jobs.database, Vault([old])) == 0
    # Both of the secrets that are valid during a rotation still sign, and receivers notice nothing.
    body, headers = sign_one(jobs, "we_1", "t", old)
    for one in (secret, before):
        assert Webhook(one).verify(body, headers)["type"] == "webhook.test"
    assert json.loads(vdiff(jobs, "secrets", "rotate", "--json", secret_keys=f"{new},{old}")) == {
        "key_id": id_of(new),
        "changed": 4,
    }
    assert f"fernet:{id_of(old)}:" not in stored(jobs)
    body, headers = sign_one(jobs, "we_1", "t", new)
    assert Webhook(secret).verify(body, headers)["type"] == "webhook.test"
    listed = json.loads(vdiff(jobs, "secrets", "list", "--json", secret_keys=f"{new},{old}"))
    assert [(row["key_id"], row["secrets"], row["state"]) for row in listed] == [
        (id_of(new), 4, "encrypts"),
        (id_of(old), 0, "decrypts"),
    ]


def test_a_missing_key_stops_what_needs_it_and_names_it(
    jobs: Jobs, old_and_new: tuple[str, str]
) -> None:
    old, new = old_and_new
    new_api_key(jobs)
    stored_secrets.reseal(jobs.database, Vault([old]))
    for keys in (Vault(), Vault([new])):
        with (
            pytest.raises(ConfigurationError, match=f"lacks the key {id_of(old)}"),
            jobs.database.read() as session,
        ):
            stored_secrets.check(session, keys)
    assert id_of(old) in vdiff(jobs, "secrets", "rotate", secret_keys=new, code=2)
    assert id_of(old) in vdiff(jobs, "api", secret_keys=new, code=2)
    assert stored(jobs).count(f"fernet:{id_of(old)}:") == 1  # nothing was lost
    with jobs.database.read() as session:
        assert stored_secrets.check(session, Vault([new, old])) == {id_of(old): 1}


def test_every_face_that_makes_a_secret_encrypts_it(jobs: Jobs, tmp_path: Any) -> None:
    import httpx

    key = new_key()
    api = ApiProcess(jobs, tmp_path / "api.log", secret_keys=key, webhook_allow_private="true")
    try:
        api.wait_ready(path="/health/live")
        with httpx.Client(base_url=api.url, timeout=60) as client:
            made = client.post("/v1/keys", json={"name": "k"}).json()["key"]
            shown = [
                client.get("/v1/webhook_secret", headers=h).json()["secret"]
                for h in ({}, auth(made))
            ]
            rotated = client.post("/v1/webhook_secret/rotate", headers=auth(made)).json()["secret"]
            assert (
                client.get("/v1/webhook_secret", headers=auth(made)).json()["secret"]
                == rotated
                != shown[1]
            )
            anonymous = client.post("/v1/webhook_secret/rotate").json()["secret"]
            endpoint = client.post(
                "/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/x"}
            ).json()
            again = client.post(f"/v1/webhook_endpoints/{endpoint['id']}/rotate_secret").json()
    finally:
        api.end()
    cli = json.loads(vdiff(jobs, "keys", "create", "c", "--json", secret_keys=key))
    assert cli["key"].startswith("vdk_")
    for secret in (*shown, rotated, anonymous, endpoint["secret"], again["secret"]):
        assert secret.startswith("whsec_") and Webhook(secret).sign("x", _now(), "{}")
    text_of_all = stored(jobs)
    assert "whsec_" not in text_of_all and CLEAR not in {
        r.key_id for r in jobs.execute(stored_secrets.counts())
    }
    body, headers = sign_one(jobs, endpoint["id"], "anonymous", key)
    assert Webhook(again["secret"]).verify(body, headers)["type"] == "webhook.test"


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)
