"""Peak memory of an API process under the largest and most complex requests that it accepts or
reads to refuse.

    PYTHONPATH=. .venv/bin/python benchmarks/api_memory.py

The peak is the kernel's own (`VmHWM` of /proc, Linux), which no moment between two looks escapes.
The worker stands still:
what it does is not the API's memory.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from report import say
from servers import served

from shared.settings import Settings
from vdiff import bundled

MODEL = "vdiff-tiny"
CHAT, COMPLETIONS, JOBS = "/v1/chat/completions", "/v1/completions", "/v1/jobs"
AT_ONCE = 4
BODY_BYTES = Settings.model_fields["max_body_bytes"].default - 1024
ESCAPES = b"\\u00e9" * (BODY_BYTES // 6 - 50)
JSON = {"content-type": "application/json"}


def bodies() -> Iterator[tuple[str, str, bytes]]:
    """Yield name, path and body of each request; each body is as large as allowed."""
    text = "x" * (BODY_BYTES - 200)
    yield "one long text", COMPLETIONS, json.dumps({"model": MODEL, "prompt": text}).encode()
    yield (
        "one long text of escapes",
        COMPLETIONS,
        b'{"model":"%s","prompt":"%s"}' % (MODEL.encode(), ESCAPES),
    )
    yield (
        "token ids",
        COMPLETIONS,
        json.dumps({"model": MODEL, "prompt": [5] * 499_000}, separators=(",", ":")).encode(),
    )
    numbers = b",".join(b"%d" % (10_000_000 + i) for i in range(BODY_BYTES // 9 - 20))
    yield (
        "token ids beyond the vocabulary",
        COMPLETIONS,
        b'{"model":"%s","prompt":[%s]}' % (MODEL.encode(), numbers),
    )
    prompts = [[5] * 3_800 for _ in range(128)]
    yield (
        "128 prompts",
        COMPLETIONS,
        json.dumps({"model": MODEL, "prompt": prompts}, separators=(",", ":")).encode(),
    )
    part = {"type": "text", "text": "ab"}
    messages = [{"role": "user", "content": [part] * 48} for _ in range(1_000)]
    yield (
        "48,000 parts of messages",
        CHAT,
        json.dumps({"model": MODEL, "messages": messages}, separators=(",", ":")).encode(),
    )
    yield (
        "members",
        JOBS,
        b'{"endpoint":"x","body":{%s}}' % b",".join(b'"%x":1' % i for i in range(190_000)),
    )
    yield "lists", JOBS, b'{"endpoint":"x","body":[%s]}' % b",".join([b"[]"] * 49_990)
    yield "lists beyond the bound", JOBS, b"[" + b"[]," * (BODY_BYTES // 3 - 10) + b"1]"
    yield "levels beyond the bound", JOBS, b"[" * BODY_BYTES
    job = {
        "endpoint": CHAT,
        "body": {"model": MODEL, "messages": [{"role": "user", "content": "1 + 1"}]},
    }
    yield "a small job", JOBS, json.dumps(job).encode()


def peak_mib(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def reset_peak(process: psutil.Process) -> None:
    """Let the kernel count the peak from now on."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


async def sent(url: str, path: str, body: bytes, times: int) -> str:
    """The statuses of so many equal requests at once."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        answers = await asyncio.gather(
            *(client.post(path, content=body, headers=JSON) for _ in range(times))
        )
    return ", ".join(sorted({str(answer.status_code) for answer in answers}))


def main() -> None:
    with served(bundled.folder(bundled.DEFAULT_MODEL), name=MODEL, slots=8) as url:
        parts: dict[str, Any] = {p.cmdline()[-1]: p for p in psutil.Process().children()}
        parts["worker"].suspend()
        api = parts["api"]
        say(f"before: {api.memory_info().rss / (1 << 20):.0f} MiB")
        say(f"| body | MB | answer | peak, MiB | {AT_ONCE} at once, MiB |")
        say("|---|---|---|---|---|")
        for what, path, body in bodies():
            reset_peak(api)
            status = asyncio.run(sent(url, path, body, 1))
            one = peak_mib(api)
            reset_peak(api)
            asyncio.run(sent(url, path, body, AT_ONCE))
            say(f"| {what} | {len(body) / 1e6:.1f} | {status} | {one:.0f} | {peak_mib(api):.0f} |")


if __name__ == "__main__":
    main()
