"""Schemathesis over our own OpenAPI document: whatever is sent, no answer is a 5xx or one that the
document does not know.

`EXAMPLES=200 pytest tests/integration/test_openapi.py` runs longer.
"""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests.integration.conftest import ApiProcess
from tests.integration.test_api_jobs import chat_job

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("EXAMPLES", "4"))
ENDLESS = ("/v1/overview/events", "/v1/deliveries/events")  # streams that end with the client
CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def api(workerless: ApiProcess) -> ApiProcess:
    return workerless


@pytest.fixture(scope="module")
def real(api: ApiProcess) -> dict[str, str]:
    """Ids of things that exist, by the names of paths' parameters."""
    with httpx.Client(base_url=api.url, timeout=120) as client:
        job = client.post("/v1/jobs", json=chat_job()).json()["id"]
        endpoint = client.post(
            "/v1/webhook_endpoints", json={"url": "http://127.0.0.1:9/x"}
        ).json()["id"]
        file = client.post(
            "/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"}
        ).json()["id"]
        batch = client.post(
            "/v1/batches",
            json={"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"},
        ).json()["id"]
        client.post(f"/v1/webhook_endpoints/{endpoint}/test")
        delivery = client.get("/v1/deliveries").json()["data"][0]["id"]
        key = client.post("/v1/keys", json={"name": "x"}).json()["id"]
    return {
        "job_id": job,
        "endpoint_id": endpoint,
        "file_id": file,
        "batch_id": batch,
        "delivery_id": str(delivery),
        "key_id": key,
        "name": "vdiff-tiny",
        "response_id": job.replace("job_", "resp_"),
    }


def operations(api: ApiProcess) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations() if found.ok().path not in ENDLESS]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_answer_that_the_document_does_not_know(
    api: ApiProcess, real: dict[str, str], mode: GenerationMode
) -> None:
    failures: list[str] = []
    with requests.Session() as session:
        for operation in operations(api):
            streams = operation.path.endswith("/events")  # of a job that waits: they would not end
            for known in (False, True) if "{" in operation.path and not streams else (False,):
                failures += _tried(operation, mode, real if known else {}, session)
    assert not failures, "\n\n".join(failures[:20])


def _tried(
    operation: Any, mode: GenerationMode, ids: dict[str, str], session: requests.Session
) -> list[str]:
    name = f"{operation.method.upper()} {operation.path}"
    wrong: list[str] = []

    @seed(1)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case: Any) -> None:
        for parameter in case.path_parameters or ():
            if parameter in ids:
                case.path_parameters[parameter] = ids[parameter]
        try:
            answer = case.call(session=session, timeout=20)
            case.validate_response(answer, checks=CHECKED)
        except schemathesis.errors.SchemathesisError as exc:
            raise AssertionError(f"{name}: {exc}") from exc

    try:
        try_one()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, name  # it takes nothing that could be wrong
    except (AssertionError, BaseExceptionGroup, requests.RequestException) as exc:
        wrong.append(f"{name} ({mode.value}, {'known' if ids else 'unknown'} ids): {exc}"[:1500])
    return wrong
