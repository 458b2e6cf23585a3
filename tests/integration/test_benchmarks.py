"""Each benchmark runs from its command line with tiny sizes, prints a table and writes JSON; Ctrl-C
ends it cleanly.

`startup` is left out: it installs a fresh environment, which takes minutes and needs the package
index.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import ROOT, eventually

pytestmark = pytest.mark.integration
RUN = [sys.executable, str(ROOT / "benchmarks" / "run_benchmark.py")]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}


def bench(tmp_path: Path, *args: object) -> list[dict[str, Any]]:
    command = [*RUN, *map(str, args), "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENV, cwd=ROOT, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert f"\n{args[0]}\n| " in done.stdout
    written = json.loads((tmp_path / f"{args[0]}.json").read_text(encoding="utf-8"))
    assert written["machine"]["cores"] >= 1 and written["command"].startswith(
        "python benchmarks/run_benchmark.py"
    )
    rows: list[dict[str, Any]] = written["rows"]
    return rows


def test_bulk(tmp_path: Path) -> None:
    sizes = ("--bulk-lines", 6, "--slow-lines", 4, "--bulk-slots", 2, "--slow-step-ms", 1)
    for row, lines in zip(bench(tmp_path, "bulk", *sizes), (6, 4), strict=True):
        assert row["lines"] == lines and row["ratio"] > 0


def test_queue(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "queue", "--samples", 3, "--repeats", 1)
    assert row["http_p50_ms"] > 0 and row["in_process_p50_ms"] > 0


def test_throughput(tmp_path: Path) -> None:
    tiny, slow = bench(
        tmp_path, "throughput", "--clients", 3, "--requests", 6, "--slots", 2, "--step-ms", 2
    )
    assert (tiny["model"], slow["model"]) == ("vdiff-tiny", "slow")
    assert tiny["ratio"] > 0 and slow["ratio"] > 0 and slow["step_ms"] >= 2


def test_the_job_systems_own(tmp_path: Path) -> None:
    """The commands work; what they measure is the business of a quiet machine."""
    single, bulk = bench(tmp_path, "accept", "--jobs", 20, "--submitters", 4)
    assert (
        single["jobs_per_s"] > 0 and bulk["jobs_per_s"] > 0 and single["synchronous_commit"] == "on"
    )
    (sent,) = bench(tmp_path, "webhooks", "--deliveries", 32)
    assert sent["deliveries"] == 32 and sent["deliveries_per_s"] > 0


def test_batch(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "batch", "--lines", 300)
    assert (
        row["checked_s"] > 0
        and row["stored_s"] >= 0
        and row["api_peak_mb"] >= row["api_before_mb"] > 0
    )


def test_engine(tmp_path: Path) -> None:
    sizes = ["--width", 64, "--layers", 1, "--vocab", 800, "--prompt-tokens", 4, "--max-tokens", 8]
    one, two = bench(tmp_path, "engine", *sizes, "--batches", 1, 2)
    assert (one["concurrent"], two["concurrent"]) == (1, 2)
    assert (one["same_tokens"], two["same_tokens"]) == (
        "8/8",
        "16/16",
    )  # else it is not the same work


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "queue", "--samples", "100000", "--output", str(tmp_path)],
        env=ENV,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        parent = psutil.Process(process.pid)
        eventually(lambda: len(parent.children()) >= 4, seconds=60, what="servers")
        children = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 130
    finally:
        process.kill()
        process.communicate()
    _gone, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_engine_benchmark(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "engine.py")
    command = [
        sys.executable,
        script,
        "caches",
        "--prompt-tokens",
        "16",
        "--max-tokens",
        "32",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENV, cwd=ROOT, check=False, timeout=170
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "engine-caches.json").read_text(encoding="utf-8"))["rows"]
    assert {row["cache"] for row in rows} == {"none", "prefix", "dual"}
    assert all(row["tokens_per_s"] > 0 for row in rows)
