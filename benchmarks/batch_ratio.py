"""A whole batch against `vdiff generate` on the same lines: what upload, checks, queue, database
and result files cost.

The batch is timed from the request that creates it to the status `completed`, when its files can be
read; the file's upload is counted, too. `vdiff generate` is timed without loading the model, as the
worker has loaded its own before.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import checkpoints
import httpx
from report import say
from servers import public_folder, served
from throughput import offline, questions

from vdiff import bundled

ENDPOINT = "/v1/chat/completions"
LIMIT_SECONDS = 1_800.0
LOOK_SECONDS = 0.25


def _through_batch(url: str, name: str, requests: list[dict[str, Any]]) -> tuple[float, int]:
    """Seconds from the upload to `completed`, and the tokens of the output file.

    Raises:
        RuntimeError: a line failed, or the batch took over LIMIT_SECONDS.
    """
    lines = [
        {"custom_id": str(i), "method": "POST", "url": ENDPOINT, "body": {"model": name, **request}}
        for i, request in enumerate(requests)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with httpx.Client(base_url=url, timeout=600) as client:
        client.post(ENDPOINT, json={"model": name, **requests[0]}).raise_for_status()  # warm
        began = time.perf_counter()
        sent = client.post(
            "/v1/files", files={"file": ("lines.jsonl", content)}, data={"purpose": "batch"}
        )
        body = {
            "input_file_id": sent.raise_for_status().json()["id"],
            "endpoint": ENDPOINT,
            "completion_window": "24h",
        }
        batch = client.post("/v1/batches", json=body).raise_for_status().json()
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            if time.perf_counter() - began > LIMIT_SECONDS:
                raise RuntimeError(
                    f"the batch is not done after {LIMIT_SECONDS:g} s: {batch['request_counts']}"
                )
            time.sleep(LOOK_SECONDS)
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        seconds = time.perf_counter() - began
        if batch["status"] != "completed" or batch["request_counts"]["completed"] != len(requests):
            raise RuntimeError(
                f"the batch ended as {batch['status']}: {batch['request_counts']}, {batch['errors']}"
            )
        output = client.get(f"/v1/files/{batch['output_file_id']}/content").raise_for_status().text
    return seconds, sum(
        json.loads(line)["response"]["body"]["usage"]["completion_tokens"]
        for line in output.splitlines()
    )


def _compare(
    name: str, model: Path, requests: list[dict[str, Any]], slots: int, step: float
) -> dict[str, Any]:
    with public_folder() as folder:
        say(f"{name}: {len(requests)} lines through `vdiff generate`")
        offline_seconds, offline_tokens = offline(model, requests, slots, folder)
    with served(model, name=name, slots=slots) as url:
        say(f"{name}: the same lines as a batch")
        batch_seconds, batch_tokens = _through_batch(url, name, requests)
    if batch_tokens != offline_tokens:
        say(
            f"{name}: {batch_tokens} tokens through the batch, {offline_tokens} offline; other batches round differently"
        )
    return {
        "model": name,
        "step_ms": step,
        "slots": slots,
        "lines": len(requests),
        "generate_jobs_per_s": len(requests) / offline_seconds,
        "batch_jobs_per_s": len(requests) / batch_seconds,
        "ratio": offline_seconds / batch_seconds,
    }


def run(*, lines: int, slow_lines: int, slots: int, slow_ms: float) -> list[dict[str, Any]]:
    """A row for vdiff-tiny, and one for a random model whose step takes `slow_ms` or more."""
    tiny = bundled.folder(bundled.DEFAULT_MODEL)
    step = checkpoints.step_ms(tiny, slots=slots, prompt_tokens=24, max_tokens=32)
    rows = [_compare("vdiff-tiny", tiny, questions(lines), slots, step)]
    with public_folder() as folder:
        say(f"looking for a model with a step of {slow_ms:g} ms")
        slow, step = checkpoints.make_slow(
            folder, at_least_ms=slow_ms, slots=slots, prompt_tokens=24, max_tokens=32
        )
        rows.append(_compare("slow", slow, questions(slow_lines, ignore_eos=True), slots, step))
    return rows
