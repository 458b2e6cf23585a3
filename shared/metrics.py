"""Metrics, each declared once and set where the thing happens. Three kinds of place:

    the API process        REQUESTS, LATENCY, ERRORS, FOLLOWERS, REQUESTS_WAITING,
                           EVALUATION_SAMPLES: what this process did; shown by it alone
    a worker               everything in WORKER: carried to PostgreSQL by its heartbeat
                           (`snapshot`), added up over all workers that ever were, and shown by
                           every API process alike (`merged`), with a label `model`
    a sender of webhooks   everything in DELIVERY: likewise, without a label of its own
    PostgreSQL             queues, jobs, workers: read when /metrics is asked
                           (api/routes/metrics.py)

So sums over API processes are right for the first kind only; the others want `max without
(instance)`.

Series of a small closed set of labels begin at 0 (`_from_zero`): a rate sees no event in a series
that begins with it.

Names from the original design: vdiff_requests_total, vdiff_request_latency_seconds,
vdiff_errors_total, vdiff_tokens_generated_total (counted by the engines).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from shared.jobs.status import TERMINAL, Priority

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

WebhookOutcome = Literal["delivered", "status", "timeout", "unreachable", "refused"]
DisabledReason = Literal["gone", "dead"]


def _from_zero(metric: Counter | Histogram, values: Iterable[str]) -> None:
    for value in values:
        metric.labels(value)


REQUESTS = Counter("vdiff_requests_total", "HTTP requests answered", ["method", "route", "status"])
LATENCY = Histogram(
    "vdiff_request_latency_seconds",
    "Time from request to the end of the answer, seconds",
    ["route"],
    buckets=SECONDS,
)
FOLLOWERS = Gauge(
    "vdiff_followers", "Clients that wait for a job or follow one, a batch, an evaluation or a list"
)
REQUESTS_WAITING = Gauge("vdiff_requests_waiting", "Sync requests that wait for room under a limit")
ERRORS = Counter("vdiff_errors_total", "Error answers by code", ["code"])
EVALUATION_SAMPLES = Counter(
    "vdiff_evaluation_samples_total",
    "Answers of evaluations that were graded, or could not be had",
    ["outcome"],
)
_from_zero(EVALUATION_SAMPLES, ("passed", "failed", "error"))
API_DUTY_FAILURES = Counter(
    "vdiff_api_duty_failures_total",
    "Failed rounds of background duties of this API process",
    ["duty"],
)

WORKER = CollectorRegistry()
ATTEMPTS = Counter(
    "vdiff_attempts_total",
    "Attempts that ended, by what became of the job",
    ["outcome"],
    registry=WORKER,
)
_from_zero(ATTEMPTS, (*sorted(TERMINAL), "requeued"))
TOKENS_COMMITTED = Counter(
    "vdiff_tokens_committed_total",
    "Tokens committed by denoising steps, as they happen",
    registry=WORKER,
)
QUEUE_SECONDS = Histogram(
    "vdiff_job_queue_seconds",
    "Time from queued to claimed, seconds",
    ["priority"],
    buckets=(*SECONDS, 900, 3600),
    registry=WORKER,
)
_from_zero(QUEUE_SECONDS, Priority)
RUN_SECONDS = Histogram(
    "vdiff_job_run_seconds",
    "Time of an attempt in its worker, seconds",
    ["algorithm"],
    buckets=SECONDS,
    registry=WORKER,
)
TOKENS_PER_FORWARD = Histogram(
    "vdiff_job_tokens_per_forward",
    "Tokens of a finished job by its model calls",
    ["algorithm"],
    buckets=(0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32),
    registry=WORKER,
)

WORKER_DUTY_FAILURES = Counter(
    "vdiff_worker_duty_failures_total",
    "Failed rounds of background duties of workers",
    ["duty"],
    registry=WORKER,
)
WORKER_MESSAGES_DROPPED = Counter(
    "vdiff_worker_messages_dropped_total",
    "Messages in Redis that workers could not read and dropped",
    registry=WORKER,
)
WORKER_CONSUMER_RESTARTS = Counter(
    "vdiff_worker_consumer_restarts_total",
    "Times that workers lost their consumer and started it again",
    registry=WORKER,
)

DELIVERY = CollectorRegistry()
SENDER_DUTY_FAILURES = Counter(
    "vdiff_sender_duty_failures_total",
    "Failed rounds of background duties of senders",
    ["duty"],
    registry=DELIVERY,
)
SENDER_MESSAGES_DROPPED = Counter(
    "vdiff_sender_messages_dropped_total",
    "Messages in Redis that senders could not read and dropped",
    registry=DELIVERY,
)
SENDER_CONSUMER_RESTARTS = Counter(
    "vdiff_sender_consumer_restarts_total",
    "Times that senders lost their consumer and started it again",
    registry=DELIVERY,
)
WEBHOOK_ATTEMPTS = Counter(
    "vdiff_webhook_attempts_total",
    "Attempts to deliver a webhook, by outcome",
    ["outcome"],
    registry=DELIVERY,
)
_from_zero(WEBHOOK_ATTEMPTS, get_args(WebhookOutcome))
WEBHOOK_SECONDS = Histogram(
    "vdiff_webhook_attempt_seconds",
    "Time of an attempt to deliver a webhook, seconds",
    buckets=SECONDS,
    registry=DELIVERY,
)
WEBHOOK_ENDPOINTS_DISABLED = Counter(
    "vdiff_webhook_endpoints_disabled_total",
    "Endpoints that were disabled, by reason",
    ["reason"],
    registry=DELIVERY,
)
_from_zero(WEBHOOK_ENDPOINTS_DISABLED, get_args(DisabledReason))

_Sample = tuple[str, dict[str, str], float]


def snapshot(registry: CollectorRegistry = WORKER) -> list[list[Any]]:
    """Every sample of this process as JSON: [name, labels, value]."""
    return [
        [sample.name, sample.labels, sample.value]
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]


def merged(
    snapshots: Iterable[tuple[str | None, Iterable[Any]]], registry: CollectorRegistry = WORKER
) -> Iterator[Metric]:
    """Families over the snapshots of (model, samples): the same series of several processes are
    added up.

    What a worker of another version carries beyond the declarations here is left out.
    """
    totals: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for model, samples in snapshots:
        for name, labels, value in samples:
            series = totals.setdefault(name, {})
            key = (*((("model", model),) if model is not None else ()), *labels.items())
            series[key] = series.get(key, 0.0) + value
    for declared in registry.collect():
        family = Metric(declared.name, declared.documentation, declared.type)
        suffixes = ("_bucket", "_count", "_sum") if declared.type == "histogram" else ("_total",)
        for suffix in suffixes:
            for key, value in sorted(
                totals.get(declared.name + suffix, {}).items(), key=_series_order
            ):
                family.add_sample(declared.name + suffix, dict(key), value)
        yield family


def _series_order(item: tuple[tuple[tuple[str, str], ...], float]) -> tuple[Any, ...]:
    labels = dict(item[0])
    bound = float(
        labels.pop("le", "inf")
    )  # buckets in the order of their bounds, not of their names
    return (*labels.items(), bound)
