"""Traces, if asked for: one from the HTTP request over the queue, the claim, the engine and the
database to the webhook.

    tracing.start("worker")                       once per process; nothing unless
                                                  OTEL_EXPORTER_OTLP_ENDPOINT is set
    with tracing.span("vdiff.attempt", parent=job.traceparent): ...
    tracing.past("vdiff.queue", began, ended)     a span whose times are known afterwards
    tracing.current()                             W3C's `traceparent` of where we are, to hand on

The only module that knows OpenTelemetry, and it imports it only when traces are asked for: without
them each of these is a look at a variable. A client's `traceparent` is kept and handed on even
then, so that a trace of theirs reaches their webhook.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from shared.errors import ConfigurationError
from shared.settings import trace_endpoint

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

HEADER = "traceparent"
# W3C Trace Context, version 00: an id of zeros is none, and what is malformed is to be ignored.
_WELL_FORMED = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STATEMENT_CHARACTERS = 500
STOP_SECONDS = 2.0

_tracer: Tracer | None = None
_provider: TracerProvider | None = None
_given: ContextVar[str | None] = ContextVar("vdiff_traceparent", default=None)


def start(part: str, environ: Mapping[str, str] | None = None) -> None:
    """Export this process's spans, when the environment names a collector.

    Args:
        part: `api`, `worker` or `deliver`; the service is called `vdiff-...` unless
            OTEL_SERVICE_NAME says otherwise.

    Raises:
        ConfigurationError: a collector is named and the extra `otel` is not installed, or the
            exporter is none of ours.
    """
    global _tracer, _provider
    if trace_endpoint(environ) is None:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        message = (
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and they need: pip install 'vdiff[otel]'"
        )
        raise ConfigurationError(message, param="OTEL_EXPORTER_OTLP_ENDPOINT") from exc
    ours = Resource.create({"service.name": f"vdiff-{part}", "service.version": _version()})
    # Endpoint, headers, sampler, limits and batching are the SDK's own OTEL_* variables.
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    _provider = provider
    _tracer = trace.get_tracer("vdiff", _version())


def stop() -> None:
    """Send what is left, for a moment: a collector that is away must not hold up the end of a
    process.
    """
    global _tracer, _provider
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, name="vdiff-traces", daemon=True)
        sending.start()
        sending.join(STOP_SECONDS)
    _tracer = _provider = None


def is_on() -> bool:
    return _tracer is not None


def remember(traceparent: str) -> None:
    """Keep the trace context of a client for `current`; a malformed one counts as absent, as W3C
    demands.
    """
    _given.set(traceparent if _WELL_FORMED.fullmatch(traceparent) else None)


def current() -> str | None:
    """The `traceparent` that what comes next belongs under: of the span we are in, else as the
    client sent it.
    """
    if _tracer is not None:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return (
                f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
            )
    return _given.get()


@contextmanager
def span(
    name: str,
    *,
    parent: str | None = None,
    kind: str = "INTERNAL",
    began: float | None = None,
    **attributes: Any,
) -> Iterator[None]:
    """A span around a block, or nothing when traces are off.

    Args:
        parent: a `traceparent` from elsewhere; without one the span belongs to the one we are in.
        began: `time.time()` seconds, when it is earlier than now.
        attributes: `job_id` becomes `vdiff.job_id`; None is left out.
    """
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span(
        name,
        _context(parent),
        kind=SpanKind[kind],
        attributes=_named(attributes),
        start_time=_nanoseconds(began),
    ):
        yield


def note(**attributes: Any) -> None:
    """Say more about the span that we are in."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(_named(attributes))


def past(
    name: str, began: float, ended: float, *, parent: str | None = None, **attributes: Any
) -> None:
    """A span whose begin and end (`time.time()` seconds) are known now."""
    if _tracer is None:
        return
    made = _tracer.start_span(
        name, _context(parent), attributes=_named(attributes), start_time=_nanoseconds(began)
    )
    made.end(_nanoseconds(max(began, ended)))


def watch(engine: sa.Engine) -> None:
    """A span for each statement that runs inside another span; polling belongs to nobody and makes
    none.
    """
    if _tracer is None:
        return
    tracer = _tracer
    from opentelemetry import trace
    from opentelemetry.trace import SpanKind, StatusCode

    def begin(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if trace.get_current_span().is_recording():
            operation = statement.lstrip().partition(" ")[0].upper()
            # The text has placeholders, never values.
            named = {"db.system.name": "postgresql", "db.operation.name": operation}
            named["db.query.text"] = statement[:_STATEMENT_CHARACTERS]
            context.vdiff_span = tracer.start_span(
                f"postgresql {operation}", kind=SpanKind.CLIENT, attributes=named
            )

    def end(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if (made := getattr(context, "vdiff_span", None)) is not None:
            made.end()

    def failed(told: Any) -> None:
        if (made := getattr(told.execution_context, "vdiff_span", None)) is not None:
            made.set_status(StatusCode.ERROR, type(told.original_exception).__name__)
            made.end()

    sa.event.listen(engine, "before_cursor_execute", begin)
    sa.event.listen(engine, "after_cursor_execute", end)
    sa.event.listen(engine, "handle_error", failed)


def _context(parent: str | None) -> Any:
    """OpenTelemetry's context under a `traceparent`; None is the current one."""
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: parent})


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"vdiff.{name}": value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)


def _version() -> str:
    try:
        return version("vdiff")
    except PackageNotFoundError:  # a checkout that nobody installed
        return "0"
