"""Prometheus' text: this process's counters, and what PostgreSQL and Redis know of queues, jobs and
workers now.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from api.auth import requires
from api.dependencies import Context, ContextDep
from shared import counts as counted
from shared import maintenance_counts, serving
from shared import metrics as measured
from shared.batches import repository as batches
from shared.batches.status import BatchStatus
from shared.db.session import is_outage
from shared.evaluations.status import EvaluationStatus
from shared.jobs import lanes, queries, suspects
from shared.jobs.status import JobStatus
from shared.keys.principal import Scope
from shared.webhooks import senders

router = APIRouter(tags=["metrics"], dependencies=[requires(Scope.ADMIN)])

# worker statistic -> metric: summed per model over all workers that ever were, so that counters
# never fall
_WORKER_COUNTERS = {
    "tokens_generated": ("vdiff_tokens_generated_total", "Tokens of finished jobs"),
    "prompt_tokens": ("vdiff_prompt_tokens_total", "Prompt tokens of finished jobs"),
    "jobs_requeued": ("vdiff_jobs_requeued_total", "Attempts that went back to the queue"),
    "ends_fenced": (
        "vdiff_ends_fenced_total",
        "Ends of attempts that came too late and were dropped",
    ),
}
_SWEEPER_ACTIONS = (
    "leases_expired",
    "deadlines_passed",
    "revisions_gone",
    "messages_pushed_again",
    "jobs_purged",
    "jobs_quarantined",
)
_ENGINE_COUNTERS = {
    "steps": ("vdiff_engine_steps_total", "Denoising steps of the engines"),
    "forwards": ("vdiff_engine_forwards_total", "Model calls of the engines"),
    "sequence_steps": (
        "vdiff_engine_sequence_steps_total",
        "Sequences times steps; by steps: the mean batch size",
    ),
    "step_seconds": ("vdiff_engine_step_seconds_total", "Seconds spent in steps"),
    "drafted": ("vdiff_apd_drafted_total", "Tokens that APD proposed to its verifier"),
    "accepted": (
        "vdiff_apd_accepted_total",
        "Tokens that it accepted; by drafted: the acceptance rate",
    ),
    "verifier_seconds": ("vdiff_apd_verifier_seconds_total", "Seconds spent in APD's verifiers"),
    "preemptions": (
        "vdiff_engine_preemptions_total",
        "Sequences that were set aside for others while they ran",
    ),
    "prefill_forwards": (
        "vdiff_engine_prefill_forwards_total",
        "Forwards of a sequence that only stored its prompt's keys and values",
    ),
    "cache_refreshes": (
        "vdiff_engine_cache_refreshes_total",
        "Full forwards that renewed an approximate cache",
    ),
}


class _Snapshot(Collector):
    """A collector of metrics that were read just now."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def queue_totals(depths: Any, ages: Any) -> dict[tuple[str, str], tuple[int, float]]:
    """(model, priority) -> (jobs, age of the oldest in seconds), over all keys."""
    oldest = {(row.model, row.priority, row.tenant, row.key_id): float(row.seconds) for row in ages}
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for row in depths:
        count, seconds = totals.get((row.model, row.priority), (0, 0.0))
        age = oldest.get((row.model, row.priority, row.tenant, row.key_id), 0.0)
        totals[row.model, row.priority] = (count + int(row.jobs), max(seconds, age))
    return totals


def database_metrics(
    by_status: Any,
    queues: dict[tuple[str, str], tuple[int, float]],
    workers: Any,
    live: Any,
    swept_totals: Any = (),
    overdue_seconds: float = 0.0,
    isolated: Any = (),
) -> Iterator[Metric]:
    """Rows of the database as metrics; pure."""
    jobs = GaugeMetricFamily("vdiff_jobs", "Jobs by state", labels=["status"])
    counts = {row.status: row.count for row in by_status}
    for status in JobStatus:
        jobs.add_metric([status.value], counts.get(status.value, 0))
    yield jobs
    depth = GaugeMetricFamily("vdiff_queue_depth", "Queued jobs", labels=["model", "priority"])
    age = GaugeMetricFamily(
        "vdiff_queue_oldest_seconds", "Age of the oldest queued job", labels=["model", "priority"]
    )
    for (model, priority), (count, seconds) in sorted(queues.items()):
        depth.add_metric([model, priority], count)
        age.add_metric([model, priority], seconds)
    yield depth
    yield age
    apart = GaugeMetricFamily(
        "vdiff_suspects", "Jobs that wait to run apart from others", labels=["model"]
    )
    suspected = {row.model: row.waiting for row in isolated}
    for name in sorted({row.model for row in workers} | set(suspected)):
        apart.add_metric([name], suspected.get(name, 0))
    yield apart
    alive = GaugeMetricFamily("vdiff_workers", "Live workers", labels=["model"])
    slots = GaugeMetricFamily(
        "vdiff_slots", "Sequences that live workers batch at once", labels=["model"]
    )
    running = GaugeMetricFamily(
        "vdiff_jobs_running", "Jobs in the engines of live workers", labels=["model"]
    )
    for name in sorted({row.model for row in workers}):
        mine = [row for row in live if row.model == name]
        alive.add_metric([name], len(mine))
        slots.add_metric([name], sum(row.slots for row in mine))
        running.add_metric([name], sum(row.stats.get("jobs_running", 0) for row in mine))
    cached = GaugeMetricFamily(
        "vdiff_engine_cache_tokens", "Tokens whose caches live engines hold", labels=["model"]
    )
    for name in sorted({row.model for row in workers}):
        mine = [row.stats.get("engine", {}) for row in live if row.model == name]
        cached.add_metric([name], sum(stats.get("cache_tokens_in_use") or 0 for stats in mine))
    yield from (alive, slots, running, cached)
    swept = CounterMetricFamily(
        "vdiff_sweeper_actions_total", "What sweepers did", labels=["action"]
    )
    counted = {row.action: int(row.total) for row in swept_totals}
    for action in _SWEEPER_ACTIONS:
        # Workers up to 0.2 counted in their own statistics.
        swept.add_metric(
            [action], counted.get(action, 0) + sum(row.stats.get(action, 0) for row in workers)
        )
    yield swept
    yield GaugeMetricFamily(
        "vdiff_lease_overdue_seconds",
        "For how long the oldest expired lease has waited for its recovery, seconds",
        value=overdue_seconds,
    )
    for table, section in ((_WORKER_COUNTERS, None), (_ENGINE_COUNTERS, "engine")):
        for key, (name, text) in table.items():
            family = CounterMetricFamily(name, text, labels=["model"])
            totals: dict[str, float] = {}
            for row in workers:
                stats = row.stats if section is None else row.stats.get(section, {})
                totals[row.model] = totals.get(row.model, 0) + stats.get(key, 0)
            for model, total in sorted(totals.items()):
                family.add_metric([model], total)
            yield family
    yield batch_sizes(workers)
    yield from measured.merged((row.model, row.stats.get("metrics", ())) for row in workers)


def batch_sizes(workers: Any) -> Metric:
    """Return how many sequences the steps of each model's engines had."""
    family = HistogramMetricFamily(
        "vdiff_engine_sequences_per_step",
        "Sequences that a denoising step batched",
        labels=["model"],
    )
    models: dict[str, tuple[dict[str, int], float]] = {}
    for row in workers:
        engine = row.stats.get("engine", {})
        sizes, total = models.get(row.model, ({}, 0.0))
        for bound, count in engine.get("batch_sizes", {}).items():
            sizes[bound] = sizes.get(bound, 0) + count
        models[row.model] = (sizes, total + engine.get("sequence_steps", 0))
    for model, (sizes, total) in sorted(models.items()):
        bounds = sorted(sizes, key=lambda bound: float(bound.strip("+")))
        if bounds:
            family.add_metric(
                [model], list(zip(bounds, accumulate(sizes[b] for b in bounds), strict=True)), total
            )
    return family


def webhook_metrics(waiting: Any, endpoints: Any, senders: Any) -> Iterator[Metric]:
    """Return the metrics of waiting deliveries and of what the senders counted; pure."""
    pending = GaugeMetricFamily(
        "vdiff_webhook_deliveries_pending", "Webhook deliveries that are still to be made"
    )
    late = GaugeMetricFamily(
        "vdiff_webhook_late_seconds",
        "For how long the first pending delivery has been due, seconds",
    )
    for row in waiting:
        pending.add_metric([], int(row.pending))
        late.add_metric([], float(row.late_seconds))
    yield from (pending, late)
    registered = GaugeMetricFamily(
        "vdiff_webhook_endpoints", "Registered webhook endpoints, by state", labels=["state"]
    )
    counts = {row.enabled: row.count for row in endpoints}
    for enabled, state in ((True, "enabled"), (False, "disabled")):
        registered.add_metric([state], counts.get(enabled, 0))
    yield registered
    yield from measured.merged(((None, row.metrics) for row in senders), measured.DELIVERY)


def batch_metrics(
    by_status: Any, lines_open: int, stored: Any, evaluated: Any = ()
) -> Iterator[Metric]:
    """Batches, files and evaluations; pure."""
    runs = GaugeMetricFamily("vdiff_evaluations", "Evaluations by state", labels=["status"])
    found = {row.status: row.count for row in evaluated}
    for state in EvaluationStatus:
        runs.add_metric([state.value], found.get(state.value, 0))
    yield runs
    batches = GaugeMetricFamily("vdiff_batches", "Batches by state", labels=["status"])
    counts = {row.status: row.count for row in by_status}
    for status in BatchStatus:
        batches.add_metric([status.value], counts.get(status.value, 0))
    lines = GaugeMetricFamily(
        "vdiff_batch_lines_open", "Lines of unfinished batches that have not ended"
    )
    lines.add_metric([], lines_open)
    files = GaugeMetricFamily("vdiff_files", "Files that are kept", labels=["purpose"])
    size = GaugeMetricFamily("vdiff_file_bytes", "Bytes of files that are kept", labels=["purpose"])
    for row in stored:
        files.add_metric([row.status], int(row.count))  # a file is counted by its purpose
        size.add_metric([row.status], int(row.bytes))
    yield from (batches, lines, files, size)


def database_up(database: bool) -> Metric:
    return GaugeMetricFamily(
        "vdiff_database_up", "Whether PostgreSQL answered this scrape", value=float(database)
    )


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextDep) -> Response:
    """This process's own numbers, and what PostgreSQL knows; while that is away the first alone,
    and that it is.
    """
    registry = CollectorRegistry()
    try:
        for families in await _from_database(context):
            registry.register(_Snapshot(families))
        registry.register(_Snapshot([database_up(True)]))
    except (SQLAlchemyError, OSError) as exc:
        if not is_outage(exc):
            raise
        registry = CollectorRegistry()
        registry.register(_Snapshot([database_up(False)]))
    return Response(
        generate_latest(REGISTRY) + generate_latest(registry), media_type=CONTENT_TYPE_LATEST
    )


async def _from_database(context: Context) -> list[Iterator[Metric]]:
    async with context.lists.read() as session:
        by_status = (await session.execute(counted.jobs_by_status())).all()
        depths = (await session.execute(lanes.depths())).all()
        ages = (
            (
                await session.execute(
                    lanes.oldest([(d.model, d.priority, d.tenant, d.key_id) for d in depths])
                )
            ).all()
            if depths
            else []
        )
        workers = (await session.execute(serving.all_workers())).all()
        stale = context.settings.worker_stale_seconds
        live = (await session.execute(serving.live_workers(stale_seconds=stale))).all()
        swept_totals = (await session.execute(maintenance_counts.totals())).all()
        isolated = (await session.execute(suspects.counts())).all()
        overdue = float((await session.execute(queries.oldest_overdue_lease())).scalar_one())
        webhooks = [
            (await session.execute(s)).all()
            for s in (senders.waiting(), senders.endpoints(), senders.all_metrics())
        ]
        bulk = batch_metrics(
            (await session.execute(counted.by_status("batch"))).all(),
            int((await session.execute(batches.lines_open())).scalar_one()),
            (await session.execute(counted.by_status("file"))).all(),
            (await session.execute(counted.by_status("evaluation"))).all(),
        )
    return [
        bulk,
        webhook_metrics(*webhooks),
        database_metrics(
            by_status, queue_totals(depths, ages), workers, live, swept_totals, overdue, isolated
        ),
    ]
