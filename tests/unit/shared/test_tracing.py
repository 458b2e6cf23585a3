"""Traces: off unless OpenTelemetry's own variables ask for them, refused with a name when they ask
for what is not built.
"""

from __future__ import annotations

import contextvars
import subprocess
import sys

import pytest

from shared import tracing
from shared.errors import ConfigurationError
from shared.settings import trace_endpoint

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off(environ: dict[str, str]) -> None:
    assert trace_endpoint(environ) is None
    tracing.start("api", environ)
    assert not tracing.is_on()


def test_on() -> None:
    assert trace_endpoint({ENDPOINT: "http://collector:4318"}) == "http://collector:4318"
    own = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}
    assert trace_endpoint(own) == "http://collector:4318/v1/traces"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        (ENDPOINT, "collector:4318"),
    ],
)
def test_what_is_not_built_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        trace_endpoint({ENDPOINT: "http://collector:4318", name: value})


def test_off_imports_nothing() -> None:
    program = (
        "import sys; from shared import tracing; tracing.start('worker', {})\n"
        "with tracing.span('x', job_id='j'): tracing.past('y', 1.0, 2.0); tracing.note(a=1)\n"
        "tracing.stop(); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"


def test_without_the_extra_the_start_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"vdiff\[otel\]"):
        tracing.start("api", {ENDPOINT: "http://127.0.0.1:1"})
    assert not tracing.is_on()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (PARENT, PARENT),
        ("", None),
        ("garbage", None),
        (PARENT.upper(), None),
        (PARENT + "-more", None),
        ("00-" + "0" * 32 + PARENT[35:], None),
        (PARENT[:36] + "0" * 16 + "-01", None),
    ],
)
def test_a_clients_traceparent_is_kept_if_it_is_one(given: str, kept: str | None) -> None:
    def look() -> str | None:
        tracing.remember(given)
        return tracing.current()

    assert contextvars.copy_context().run(look) == kept
