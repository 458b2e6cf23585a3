"""Cost of the queue: one job at a time through HTTP, queue, worker and database, and the same
request in process.

The two take turns, so that whatever else the machine does hits both. A random model of a fixed
amount of work is not needed: the request is greedy, its text and its number of steps are the same
each time.
"""

from __future__ import annotations

import time
from typing import Any

import httpx
from report import percentile, progress, say
from servers import served

from shared.sampling_params import resolve_params
from vdiff import bundled
from worker.engine import VDiffConfig, VDiffEngine

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
FIELDS = {"max_tokens": 32, "temperature": 0.0}
WARM_UP = 10


def run(*, samples: int, slots: int = 8) -> dict[str, Any]:
    """p50 of both in milliseconds, and where the difference is spent."""
    model = bundled.folder(bundled.DEFAULT_MODEL)
    say("queue overhead: starting the servers")
    with (
        served(model, name="vdiff-tiny", slots=slots) as url,
        VDiffEngine(VDiffConfig(model=str(model), device="cpu", max_num_seqs=slots)) as engine,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        ids = engine.tokenizer.encode_chat(MESSAGES)
        params = resolve_params(FIELDS, card=engine.card, prompt_tokens=len(ids), chat=True)
        http: list[float] = []
        inside: list[float] = []
        timings: list[dict[str, float]] = []
        for number in progress(range(WARM_UP + samples), WARM_UP + samples, "queue overhead"):
            began = time.perf_counter()
            answer = client.post(
                "/v1/chat/completions", json={"model": "vdiff-tiny", "messages": MESSAGES, **FIELDS}
            )
            between = time.perf_counter()
            output = engine.submit(f"r{number}", ids, params).result()
            ended = time.perf_counter()
            answer.raise_for_status()
            data = answer.json()
            if data["choices"][0]["message"]["content"] != output.outputs[0].text:
                raise RuntimeError("the two answers differ; they were not the same request")
            if number >= WARM_UP:
                http.append(1000 * (between - began))
                inside.append(1000 * (ended - between))
                timings.append(data["vdiff"]["timing"])
    queued = percentile([t["queued_ms"] for t in timings], 0.5)
    decoding = percentile([t["prompt_ms"] + t["denoise_ms"] for t in timings], 0.5)
    p50_http, p50_inside = percentile(http, 0.5), percentile(inside, 0.5)
    return {
        "samples": samples,
        "http_p50_ms": p50_http,
        "in_process_p50_ms": p50_inside,
        "overhead_p50_ms": p50_http - p50_inside,
        "http_p95_ms": percentile(http, 0.95),
        "in_process_p95_ms": percentile(inside, 0.95),
        "until_claimed_p50_ms": queued,  # by the database's clock: INSERT to claim
        "decoding_p50_ms": decoding,
    }
