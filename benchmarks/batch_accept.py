"""A large batch: how long until it is uploaded, checked and made of jobs, and what memory the API
takes for it.

The API checks and stores while the worker already runs the first lines, as it always is. Memory is
the API process's resident set: what stays bounded is the difference between the peak and the start,
for any number of lines.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from report import say
from servers import public_folder, served

from vdiff import bundled

MODEL = "vdiff-tiny"
ENDPOINT = "/v1/chat/completions"
LOOK_SECONDS = 0.1
LIMIT_SECONDS = 1_800.0
LABEL_MAX = 500  # characters of a label; 16 labels may be
LINE_BYTES_MORE = 220  # of a line beside prompt and labels, roughly
MIB = 1 << 20
SLOTS = 8


class Memory:
    """The largest resident set of a process since `begin`, looked at ten times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._stop = threading.Event()
        self.before = self.peak = process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def write_lines(path: Path, count: int, words: int, line_bytes: int = 0) -> None:
    """So many requests of about so many words; with labels that no model reads, each has about
    `line_bytes`, 8,000 at most.
    """
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = "What is 17 + 25? " + "apple river " * (words // 2)
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 1,
                "seed": i,
            }
            missing = line_bytes - len(text) - LINE_BYTES_MORE
            if missing > 0:
                body["metadata"] = {
                    f"pad-{part}": "x" * min(LABEL_MAX, missing - at)
                    for part, at in enumerate(range(0, missing, LABEL_MAX))
                }
            line = {"custom_id": f"line-{i}", "method": "POST", "url": ENDPOINT, "body": body}
            file.write(json.dumps(line) + "\n")


@contextmanager
def _timed(into: dict[str, Any], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    into[name] = time.perf_counter() - began


def _wait(client: httpx.Client, batch_id: str, done: Any) -> dict[str, Any]:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] == "failed":
            raise RuntimeError(f"the batch failed: {batch['errors']}")
        if done(batch):
            return batch
        time.sleep(0.2)
    raise RuntimeError(f"batch {batch_id} is not far enough after {LIMIT_SECONDS:g} s")


def run(*, lines: int, words: int, worker: str, line_bytes: int = 0) -> dict[str, Any]:
    """Args: worker: `running`, as it is in practice; `stopped`, so that the API and PostgreSQL have
    the cores.
    """
    row: dict[str, Any] = {"lines": lines, "worker": worker}
    with (
        public_folder() as folder,
        served(bundled.folder(bundled.DEFAULT_MODEL), name=MODEL, slots=SLOTS) as url,
    ):
        parts = {p.cmdline()[-1]: p for p in psutil.Process().children()}
        api = parts["api"]
        if worker == "stopped":
            parts["worker"].suspend()
        source = folder / "lines.jsonl"
        write_lines(source, lines, words, line_bytes)
        row["file_mb"] = source.stat().st_size / MIB
        with httpx.Client(base_url=url, timeout=600) as client, Memory(api) as memory:
            with _timed(row, "upload_s"), source.open("rb") as file:
                sent = client.post(
                    "/v1/files", files={"file": ("lines.jsonl", file)}, data={"purpose": "batch"}
                )
                file_id = sent.raise_for_status().json()["id"]
            body = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
            batch_id = client.post("/v1/batches", json=body).raise_for_status().json()["id"]
            with _timed(row, "checked_s"):
                _wait(client, batch_id, lambda b: b["status"] != "validating")
            say(f"{lines} lines are checked")
            with _timed(row, "stored_s"):
                _wait(client, batch_id, lambda b: b["vdiff"]["stored"] == lines)
            with (
                _timed(row, "download_s"),
                client.stream("GET", f"/v1/files/{file_id}/content") as answer,
            ):
                size = sum(len(part) for part in answer.iter_bytes())
            if size != source.stat().st_size:
                raise RuntimeError(f"{size} bytes came back of {source.stat().st_size}")
            parts["worker"].resume()
            client.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
            with _timed(row, "cancelled_s"):
                _wait(client, batch_id, lambda b: b["status"] == "cancelled")
        row["api_before_mb"] = memory.before / MIB
        row["api_peak_mb"] = memory.peak / MIB
    row["lines_per_s"] = lines / (row["checked_s"] + row["stored_s"])
    return row
