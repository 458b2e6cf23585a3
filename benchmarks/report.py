"""Output of all benchmarks: progress with an ETA, a small table, JSON with the machine's facts."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

TELL_SECONDS = 5.0
T = TypeVar("T")


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass `items` on and say on stderr now and then how many are done and when the rest will be."""
    began = told = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and (terminal or now - told > TELL_SECONDS):
            told = now
            left = (total - done) * (now - began) / done
            end = "\r" if terminal else "\n"
            print(
                f"{what}: {done}/{total}, ETA {left:.0f} s   ", end=end, file=sys.stderr, flush=True
            )
        yield item
    if terminal:
        print(" " * 70, end="\r", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> dict[str, Any]:
    """Return the facts of the machine, and how busy it was."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            model,
        )
    packages = (
        "torch",
        "celery",
        "redis",
        "fastapi",
        "sqlalchemy",
        "psycopg",
        "asyncpg",
        "uvicorn",
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several: the median of each number, everything else as in the first run."""
    first = runs[0]
    return {
        key: statistics.median(run[key] for run in runs)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else value
        for key, value in first.items()
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def publish(
    name: str, rows: Sequence[Mapping[str, Any]], runs: Any, facts: Mapping[str, Any], output: Path
) -> None:
    """Print the table, write the JSON: what was run, where, the medians and every run."""
    print(f"\n{name}\n{table(rows)}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.json"
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    data = {"name": name, "command": command, "machine": facts, "rows": rows, "runs": runs}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {file}")
