"""Metrics over the path from workers to the database and the API: the same series, over processes,
in Prometheus' text.
"""

from __future__ import annotations

import json
import subprocess
import sys

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shared.db.tables.evaluations import OUTCOMES
from shared.metrics import TOKENS_COMMITTED, WORKER, merged, snapshot
from worker.pace import Pace


class Shown:
    def __init__(self, families: list[object]) -> None:
        self.families = families

    def collect(self) -> list[object]:
        return self.families


def registry() -> tuple[CollectorRegistry, Counter, Histogram]:
    own = CollectorRegistry()
    return (
        own,
        Counter("a_total", "a", ["kind"], registry=own),
        Histogram("b_seconds", "b", buckets=(1, 10), registry=own),
    )


def test_two_workers_add_up_and_a_third_model_stays_apart() -> None:
    carried = []
    for model, values in (("m", (0.5, 5)), ("m", (50,)), ("other", (5,))):
        own, count, seconds = registry()
        count.labels(kind="x").inc(2)
        for value in values:
            seconds.observe(value)
        carried.append((model, json.loads(json.dumps(snapshot(own)))))
    carried.append(("m", [["of_a_newer_version_total", {}, 1.0]]))
    own, _, _ = registry()
    shown = CollectorRegistry()
    shown.register(Shown(list(merged(carried, own))))  # type: ignore[arg-type]
    text = generate_latest(shown).decode()
    read = {
        (s.name, *sorted(s.labels.items())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    assert read[("a_total", ("kind", "x"), ("model", "m"))] == 4
    assert read[("b_seconds_count", ("model", "m"))] == 3
    assert read[("b_seconds_sum", ("model", "m"))] == 55.5
    assert read[("b_seconds_count", ("model", "other"))] == 1
    series = [
        s.labels
        for f in text_string_to_metric_families(text)
        for s in f.samples
        if "le" in s.labels
    ]
    bounds = [labels["le"] for labels in series if labels["model"] == "m"]
    assert [float(bound) for bound in bounds] == [1.0, 10.0, float("inf")]
    assert "newer" not in text


def test_pace_is_what_happened_since_the_last_look() -> None:
    moments = iter([0.0, 10.0, 20.0])
    pace = Pace(now=lambda: next(moments))
    work = {"forwards": 4, "steps": 4, "sequence_steps": 8, "step_seconds": 0.4}
    pace_before = WORKER.get_sample_value("vdiff_tokens_committed_total")
    TOKENS_COMMITTED.inc(40)
    first = pace.since_last(work)
    assert (first["batch"], first["step_ms"]) == (2.0, 100.0)
    assert first["tokens_per_second"] == ((pace_before or 0) + 40) / 10
    idle = pace.since_last(work)
    assert (idle["tokens_per_second"], idle["batch"], idle["tokens_per_forward"]) == (
        0.0,
        None,
        None,
    )


def test_series_of_closed_sets_begin_at_zero() -> None:
    """In a process where nothing happened yet: an alert on an increase must see the first event,
    not begin with it.
    """
    program = (
        "import json; from prometheus_client import REGISTRY; from shared.metrics import *;"
        "print(json.dumps([snapshot(r) for r in (REGISTRY, WORKER, DELIVERY)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    own, worker, delivery = (
        {(name, *labels.values()): value for name, labels, value in samples}
        for samples in json.loads(done.stdout)
    )
    attempts = {key[1]: value for key, value in worker.items() if key[0] == "vdiff_attempts_total"}
    assert attempts == dict.fromkeys(("succeeded", "failed", "cancelled", "expired", "requeued"), 0)
    waited = {
        key[1]: value for key, value in worker.items() if key[0] == "vdiff_job_queue_seconds_count"
    }
    assert waited == dict.fromkeys(("interactive", "normal", "bulk"), 0)
    sent = {key[1] for key in delivery if key[0] == "vdiff_webhook_attempts_total"}
    assert sent == {"delivered", "status", "timeout", "unreachable", "refused"}
    assert delivery["vdiff_webhook_endpoints_disabled_total", "gone"] == 0
    assert delivery["vdiff_webhook_endpoints_disabled_total", "dead"] == 0
    assert {key[1] for key in own if key[0] == "vdiff_evaluation_samples_total"} == set(OUTCOMES)
    shown = CollectorRegistry()
    shown.register(Shown(list(merged([("m", json.loads(done.stdout)[1])]))))  # type: ignore[arg-type]
    assert 'vdiff_attempts_total{model="m",outcome="failed"} 0.0' in generate_latest(shown).decode()
