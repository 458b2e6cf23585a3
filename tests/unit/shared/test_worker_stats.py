"""Counters of several workers as one worker's; the engines' batch sizes as a histogram."""

from __future__ import annotations

from types import SimpleNamespace

from api.routes.metrics import batch_sizes
from shared.worker_stats import folded
from worker.engine.state import EngineStats


def test_counters_add_up_by_name_and_series() -> None:
    one = {
        "jobs_succeeded": 2,
        "python": "3.11",
        "recent": {"batch": 1.5},
        "engine": {"steps": 3, "batch_sizes": {"1": 2, "+Inf": 1}},
        "metrics": [["a_total", {"kind": "x"}, 2.0], ["b_sum", {}, 0.5]],
    }
    other = {
        "jobs_succeeded": 5,
        "jobs_failed": 1,
        "engine": {"steps": 4, "state": "ready", "batch_sizes": {"1": 5, "2": 1}},
        "metrics": [["a_total", {"kind": "x"}, 1.0], ["a_total", {"kind": "y"}, 1.0]],
    }
    whole = folded([one, {}, other])
    assert (whole["jobs_succeeded"], whole["jobs_failed"]) == (7, 1)
    assert whole["engine"] == {"steps": 7, "batch_sizes": {"1": 7, "+Inf": 1, "2": 1}}
    assert whole["metrics"] == [
        ["a_total", {"kind": "x"}, 3.0],
        ["b_sum", {}, 0.5],
        ["a_total", {"kind": "y"}, 1.0],
    ]
    assert "recent" not in whole and "python" not in whole
    assert folded([whole]) == whole


def test_steps_are_counted_by_their_sequences() -> None:
    stats = EngineStats()
    for sequences in (1, 2, 3, 4, 300):
        stats.note_step(sequences, 0.5)
    assert (stats.steps, stats.sequence_steps, stats.step_seconds) == (5, 310, 2.5)
    rows = [
        SimpleNamespace(
            model="m", stats={"engine": {"batch_sizes": stats.batch_sizes, "sequence_steps": 310}}
        ),
        SimpleNamespace(
            model="m", stats={"engine": {"batch_sizes": {"4": 1}, "sequence_steps": 4}}
        ),
        SimpleNamespace(model="of-an-older-version", stats={}),
    ]
    samples = {(s.name, s.labels.get("le")): s.value for s in batch_sizes(rows).samples}
    name = "vdiff_engine_sequences_per_step"
    assert [samples[f"{name}_bucket", le] for le in ("1", "2", "4", "8", "256", "+Inf")] == [
        1,
        2,
        5,
        5,
        5,
        6,
    ]
    assert (samples[f"{name}_count", None], samples[f"{name}_sum", None]) == (6, 314)
    assert {s.labels["model"] for s in batch_sizes(rows).samples} == {"m"}
