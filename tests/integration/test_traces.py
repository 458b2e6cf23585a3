"""One trace of one job: API, worker and webhook sender report to a collector that listens here."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.integration.conftest import ApiProcess, Jobs, WorkerProcess, eventually
from tests.integration.test_webhooks import start_deliver

pytestmark = pytest.mark.integration
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@dataclass
class Collector:
    """Takes OTLP over HTTP at /v1/traces, and webhooks at /hook."""

    url: str = ""
    spans: list[tuple[str, Any]] = field(default_factory=list)  # (service, span)
    hooks: list[dict[str, str]] = field(default_factory=list)

    def named(self, name: str) -> list[tuple[str, Any]]:
        return [(service, span) for service, span in list(self.spans) if span.name == name]

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.spans += [
                (about["service.name"], span)
                for scope in resource.scope_spans
                for span in scope.spans
            ]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                found.take(
                    gzip.decompress(body)
                    if self.headers.get("content-encoding") == "gzip"
                    else body
                )
            else:
                found.hooks.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def traced(
    jobs_module: Jobs, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("traced")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        worker = WorkerProcess(jobs_module, folder / "worker.log")
        stack.callback(worker.end)
        api = ApiProcess(jobs_module, folder / "api.log", webhook_allow_private="true")
        stack.callback(api.end)
        process = start_deliver(jobs_module, folder / "deliver.log")
        stack.callback(lambda: (process.kill(), process.wait()))
        worker.wait_ready()
        api.wait_ready()
        yield stack.enter_context(httpx.Client(base_url=api.url, timeout=60))


def submit(
    client: httpx.Client, model: str, collector: Collector, **headers: str
) -> dict[str, Any]:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    hook = {"url": f"{collector.url}/hook", "events": ["job.succeeded"]}
    request = {"endpoint": "/v1/completions", "body": body, "webhook": hook}
    answer = client.post("/v1/jobs", json=request, headers={"prefer": "wait=30", **headers})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_one_trace_from_the_request_to_the_webhook(
    traced: httpx.Client, jobs_module: Jobs, collector: Collector
) -> None:
    job = submit(traced, jobs_module.model, collector, traceparent=PARENT)
    assert job["status"] == "succeeded"
    wanted = {
        "vdiff-api": ["POST /v1/jobs", "vdiff.enqueue", "postgresql INSERT"],
        "vdiff-worker": [
            "vdiff.queue",
            "vdiff.attempt",
            "vdiff.claim",
            "vdiff.engine.wait",
            "vdiff.engine.prompt",
            "vdiff.engine.denoise",
            "vdiff.record",
        ],
        "vdiff-deliver": ["vdiff.deliver", "postgresql INSERT"],
    }
    pairs = {(service, name) for service, names in wanted.items() for name in names}

    def of_trace() -> dict[tuple[str, str], Any]:
        return {
            (service, s.name): s
            for service, s in list(collector.spans)
            if s.trace_id.hex() == TRACE
        }

    eventually(lambda: pairs <= of_trace().keys(), what="every span of the trace")
    spans = of_trace()
    request, attempt = spans["vdiff-api", "POST /v1/jobs"], spans["vdiff-worker", "vdiff.attempt"]
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    # What the row keeps is the request's own span, so that all that follows hangs below it.
    for place in (
        attempt,
        spans["vdiff-worker", "vdiff.queue"],
        spans["vdiff-deliver", "vdiff.deliver"],
    ):
        assert place.parent_span_id == request.span_id
    for name in ("vdiff.claim", "vdiff.engine.prompt", "vdiff.engine.denoise", "vdiff.record"):
        inner = spans["vdiff-worker", name]
        assert inner.parent_span_id == attempt.span_id
        assert (
            attempt.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano
        )
    told = {a.key: a.value for a in spans["vdiff-worker", "vdiff.engine.denoise"].attributes}
    assert told["vdiff.forwards"].int_value == job["diffusion"]["forwards"]
    about = {a.key: a.value.string_value for a in attempt.attributes}
    assert (about["vdiff.job_id"], about["vdiff.outcome"]) == (job["id"], "succeeded")
    hook = eventually(lambda: list(collector.hooks), what="the webhook")[0]
    deliver = spans["vdiff-deliver", "vdiff.deliver"]
    assert hook["traceparent"] == f"00-{TRACE}-{deliver.span_id.hex()}-01"


def test_without_a_traceparent_the_request_begins_a_trace(
    traced: httpx.Client, jobs_module: Jobs, collector: Collector
) -> None:
    job = submit(traced, jobs_module.model, collector, traceparent="not one")

    def attempts() -> list[Any]:
        made = [s for _, s in collector.named("vdiff.attempt")]
        return [s for s in made if job["id"] in [a.value.string_value for a in s.attributes]]

    (attempt,) = eventually(attempts, what="the attempt")
    eventually(
        lambda: attempt.trace_id in [s.trace_id for _, s in collector.named("POST /v1/jobs")]
    )
    assert attempt.trace_id.hex() != TRACE
    assert not [s.name for _, s in list(collector.spans) if "/health" in s.name], (
        "probes are no traces"
    )
