"""32 HTTP clients at once against `vdiff generate` with the same slots: what the way through the
queue costs under load.

Both decode the same requests with the same model. For vdiff-tiny, whose step takes a few
milliseconds, HTTP, queue and database compete with the model for the cores; a model with a step of
50 ms or more is what the aim of 0.95 is about.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import httpx
from report import progress, say
from servers import ROOT, clean_environment, public_folder, served

from vdiff import bundled

GENERATE = (
    "import json, sys; from pathlib import Path; from worker.engine import VDiffConfig; "
    "from worker.offline import generate_file; "
    "s = generate_file(VDiffConfig(model=sys.argv[1], device='cpu', max_num_seqs=int(sys.argv[2])), "
    "Path(sys.argv[3]), Path(sys.argv[4])); "
    "print(json.dumps({'seconds': s.seconds, 'tokens': s.tokens, 'errors': s.errors}))"
)


def questions(count: int, **fields: Any) -> list[dict[str, Any]]:
    """So many requests, from the shipped evaluation set, kinds mixed."""
    text = (bundled.folder(bundled.DEFAULT_MODEL) / "eval.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    picked = [lines[(i * 81) % len(lines)] for i in range(count)]
    return [
        {"messages": line["messages"], "max_tokens": line["max_tokens"], **fields}
        for line in picked
    ]


def offline(
    model: Path, requests: list[dict[str, Any]], slots: int, folder: Path
) -> tuple[float, int]:
    """Seconds and tokens of what `vdiff generate` does, loading not counted."""
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        GENERATE,
        str(model),
        str(slots),
        str(source),
        str(folder / "out.jsonl"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"vdiff generate ended with {done.returncode}: {done.stderr[-1000:]}")
    summary = json.loads(done.stdout)
    if summary["errors"]:
        raise RuntimeError(f"vdiff generate refused {summary['errors']} requests")
    return summary["seconds"], summary["tokens"]


async def online(
    url: str, name: str, requests: list[dict[str, Any]], clients: int
) -> tuple[float, int]:
    """Seconds and tokens of the same requests, so many at once."""
    waiting = iter(progress(requests, len(requests), f"{name} over HTTP"))
    tokens = 0

    async def one() -> None:
        nonlocal tokens
        for request in waiting:
            answer = await client.post("/v1/chat/completions", json={"model": name, **request})
            answer.raise_for_status()
            tokens += answer.json()["usage"]["completion_tokens"]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        warm_up = requests[0]
        (
            await client.post("/v1/chat/completions", json={"model": name, **warm_up})
        ).raise_for_status()
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())
        return time.perf_counter() - began, tokens


def compare(
    name: str, model: Path, requests: list[dict[str, Any]], clients: int, slots: int, step: float
) -> dict[str, Any]:
    with public_folder() as folder:
        say(f"{name}: vdiff generate")
        offline_seconds, offline_tokens = offline(model, requests, slots, folder)
    with served(model, name=name, slots=slots) as url:
        online_seconds, online_tokens = asyncio.run(online(url, name, requests, clients))
    if online_tokens != offline_tokens:
        say(
            f"{name}: {online_tokens} tokens over HTTP, {offline_tokens} offline; other batches round differently"
        )
    return {
        "model": name,
        "step_ms": step,
        "clients": clients,
        "slots": slots,
        "requests": len(requests),
        "generate_tokens_per_s": offline_tokens / offline_seconds,
        "http_tokens_per_s": online_tokens / online_seconds,
        "ratio": (online_tokens / online_seconds) / (offline_tokens / offline_seconds),
    }


def run(*, clients: int, requests: int, slots: int, slow_ms: float) -> list[dict[str, Any]]:
    """A row for vdiff-tiny and one for a random model whose step takes `slow_ms` or more."""
    tiny = bundled.folder(bundled.DEFAULT_MODEL)
    step = checkpoints.step_ms(tiny, slots=slots, prompt_tokens=24, max_tokens=32)
    rows = [compare("vdiff-tiny", tiny, questions(requests), clients, slots, step)]
    with public_folder() as folder:
        say(f"looking for a model with a step of {slow_ms:g} ms")
        slow, step = checkpoints.make_slow(
            folder, at_least_ms=slow_ms, slots=slots, prompt_tokens=24, max_tokens=32
        )
        fixed = questions(max(clients, requests // 2), ignore_eos=True)
        rows.append(compare("slow", slow, fixed, clients, slots, step))
    return rows
