"""Bodies and signatures, checked with the library that receivers use."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from shared.errors import ConfigurationError, InvalidParameter
from shared.settings import load_settings
from shared.webhooks.events import INLINE_MAX_BYTES, event_body, event_types, signed_headers
from shared.webhooks.requests import endpoint_values, job_webhook
from shared.webhooks.secrets import new_secret
from worker.delivery import retry_after

EVENT = {
    "id": "evt_1",
    "type": "job.succeeded",
    "job_id": "job_1",
    "batch_id": None,
    "status": "succeeded",
    "sequence": 3,
    "created_at": datetime(2026, 1, 1, tzinfo=UTC),
}


def test_the_library_of_receivers_accepts_it_and_nothing_else() -> None:
    old, new, body, now = new_secret(), new_secret(), event_body(EVENT), datetime.now(UTC)
    headers = signed_headers("evt_1", body, [new, old], now=now)
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers)["data"]["id"] == "job_1"
    for wrong_body, wrong_headers, secret in [
        (body + b" ", headers, new),
        (body, {**headers, "webhook-id": "evt_2"}, new),
        (body, headers, new_secret()),
        (body, signed_headers("evt_1", body, [new], now=now - timedelta(minutes=10)), new),
    ]:
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(wrong_body, wrong_headers)


def test_the_body_is_thin_and_the_result_inline_to_16_kb() -> None:
    body = json.loads(event_body(EVENT))
    assert body == {
        "id": "evt_1",
        "object": "event",
        "type": "job.succeeded",
        "created_at": 1767225600,
        "timestamp": "2026-01-01T00:00:00Z",
        "data": {
            "id": "job_1",
            "status": "succeeded",
            "sequence": 3,
            "result_url": "/v1/jobs/job_1/result",
        },
    }
    assert json.loads(event_body(EVENT, {"a": "\u00e9"}))["data"]["result"] == {"a": "\u00e9"}
    assert "result" not in json.loads(event_body(EVENT, {"a": "x" * INLINE_MAX_BYTES}))["data"]


def test_a_batchs_event_names_the_batch() -> None:
    event = {
        **EVENT,
        "type": "batch.completed",
        "job_id": None,
        "batch_id": "batch_1",
        "status": "completed",
    }
    data = json.loads(event_body(event))["data"]
    assert data == {
        "id": "batch_1",
        "status": "completed",
        "sequence": 3,
        "result_url": "/v1/batches/batch_1",
    }


def test_a_job_subscribes_to_events_of_jobs_alone() -> None:
    with pytest.raises(InvalidParameter) as wrong:
        job_webhook(
            {"url": "https://x.example", "events": ["batch.completed"]}, allow_private=False
        )
    assert wrong.value.param == "webhook.events"


@pytest.mark.parametrize("value", [None, [], "job.failed", ["job.done"], [1]])
def test_event_types_are_checked(value: object) -> None:
    with pytest.raises(InvalidParameter):
        event_types(value, "events")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "body"),
        ({}, "url"),
        ({"url": "https://x.example", "colour": 1}, "colour"),
        ({"url": "http://x.example"}, "url"),
        ({"url": "https://x.example", "events": ["x"]}, "events"),
        ({"url": "https://x.example", "description": 5}, "description"),
        ({"url": "https://x.example", "metadata_filter": {"a": 1}}, "metadata_filter.a"),
        ({"url": "https://x.example", "inline_result": "yes"}, "inline_result"),
    ],
)
def test_endpoints_are_checked(given: object, param: str) -> None:
    with pytest.raises(InvalidParameter.__mro__[1]) as refused:
        endpoint_values(given, allow_private=False, partial=False)
    assert getattr(refused.value, "param", None) == param


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("https://x.example", "body"),
        ({}, "webhook.url"),
        ({"url": "https://x.example", "endpoint_id": "we_1"}, "webhook.url"),
        ({"url": "https://10.0.0.1:22"}, "webhook.url"),
        ({"endpoint_id": "we_1"}, "webhook.endpoint_id"),
        ({"url": "https://x.example", "secret": "s"}, "webhook.secret"),
        ({"url": "https://x.example", "inline_result": 1}, "webhook.inline_result"),
    ],
)
def test_webhooks_of_jobs_are_checked(given: object, param: str) -> None:
    with pytest.raises(InvalidParameter.__mro__[1]) as refused:
        job_webhook(given, allow_private=False)
    assert getattr(refused.value, "param", None) in (param, "webhook")


def test_retry_after_in_both_forms() -> None:
    def asked(value: str) -> float:
        return retry_after(httpx.Response(503, headers={"retry-after": value}))

    assert asked("120") == 120.0
    assert asked("999999999") == 86_400.0
    later = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 90 < asked(later) <= 100
    assert asked("soon") == asked("-5") == retry_after(None) == 0.0
    assert asked("Mon, 01 Jan 999999999999 00:00:00 GMT") == 0.0


def test_the_schedule_is_a_setting() -> None:
    assert load_settings({}).webhook_retry_seconds[:2] == (5, 300)
    assert load_settings({"VDIFF_WEBHOOK_RETRY_SECONDS": "1,2.5"}).webhook_retry_seconds == (1, 2.5)
    for bad in ("x", "-1", "1,,2", "1e9"):
        with pytest.raises(ConfigurationError, match="VDIFF_WEBHOOK_RETRY_SECONDS"):
            load_settings({"VDIFF_WEBHOOK_RETRY_SECONDS": bad})
