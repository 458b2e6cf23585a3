"""Cost of idle followers: transactions, Redis connections, CPU and memory of one API process.

    python benchmarks/followers.py [--followers 2000] [--seconds 30] [--output
    docs/benchmarks/followers.md]

A whole vdiff of its own, whose worker is stopped once its model is registered, so that every job
stays queued. The followers are event streams of jobs, OpenAI streams, sync calls, long polls and
streams of the overview. Transactions are those of pg_stat_database, connections those of CLIENT
LIST, before and with the followers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import redis
from servers import whole
from sqlalchemy import text

from shared.db.session import Database
from vdiff import bundled

MODEL = "m"
SHARES = {
    "job events": 40,
    "OpenAI streams": 20,
    "sync calls": 20,
    "long polls": 15,
    "overview streams": 5,
}  # percent
AT_ONCE = 32  # requests that are being opened
BOUND_TRANSACTIONS, BOUND_CONNECTIONS = 20.0, 10
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class Sample:
    """Cost of the process at one moment."""

    at: float
    transactions: int
    connections: int
    cpu_seconds: float
    memory_bytes: int


def api_process() -> int:
    """The pid of the API, a child of this process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if parent == os.getpid() and b"api" in command:
            return int(folder.name)
    raise RuntimeError("the API's process is not found")


def look(database: Database, client: redis.Redis, pid: int) -> Sample:
    with database.read() as session:
        session.execute(text("SELECT pg_stat_force_next_flush()"))
        total = text(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        transactions = int(session.execute(total).scalar_one())
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    memory = (
        int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        * 1024
    )
    cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    return Sample(time.monotonic(), transactions, len(client.client_list()), cpu, memory)  # type: ignore[arg-type]


async def open_one(
    url: str, kind: str, job_id: str, gate: asyncio.Semaphore
) -> asyncio.StreamWriter:
    """Send a follower's request. A stream is there with its first bytes, another one once it is
    sent.
    """
    where = urlsplit(url)
    body = b""
    if kind in ("OpenAI streams", "sync calls"):
        body = json.dumps({**CHAT, "stream": kind == "OpenAI streams"}).encode()
        head = "POST /v1/chat/completions"
    elif kind == "overview streams":
        head = "GET /v1/overview/events"
    else:
        head = f"GET /v1/jobs/{job_id}" + ("/events" if kind == "job events" else "?wait=280")
    async with gate:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        lines = f"{head} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"{lines}\r\n\r\n".encode() + body)
        await writer.drain()
        if kind.endswith(("streams", "events")):
            status = await asyncio.wait_for(reader.readline(), 60)
            if b" 200 " not in status:
                raise RuntimeError(f"{head}: {status!r} {await reader.read(2000)!r}")
    return writer


async def measure(
    parts: Any, client: redis.Redis, followers: int, seconds: float
) -> dict[str, Any]:
    database, pid = Database(parts.database_url), api_process()
    with database.read() as session:
        for worker in session.execute(text("SELECT pid FROM workers")).scalars():
            os.kill(worker, signal.SIGSTOP)  # a child of ours; it is killed at the end
    counts = {kind: followers * share // 100 for kind, share in SHARES.items()}
    async with httpx.AsyncClient(base_url=parts.url, timeout=60) as http:
        needed = counts["job events"] + counts["long polls"]
        ids = []
        for _ in range(needed):
            answer = await http.post(
                "/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": CHAT}
            )
            ids.append(answer.raise_for_status().json()["id"])
    await asyncio.sleep(5)
    idle = [look(database, client, pid)]
    await asyncio.sleep(seconds)
    idle.append(look(database, client, pid))
    gate, opened = asyncio.Semaphore(AT_ONCE), []
    for kind, count in counts.items():
        wanted = [ids.pop() if kind in ("job events", "long polls") else "" for _ in range(count)]
        opened += await asyncio.gather(
            *(open_one(parts.url, kind, job_id, gate) for job_id in wanted)
        )
    async with httpx.AsyncClient(base_url=parts.url, timeout=60) as http:
        while True:  # until the last sync call and long poll is in
            page = (await http.get("/metrics")).text
            there = next(
                float(line.split()[1])
                for line in page.splitlines()
                if line.startswith("vdiff_followers ")
            )
            if there >= sum(counts.values()):
                break
            await asyncio.sleep(0.5)
    await asyncio.sleep(5)
    busy = [look(database, client, pid)]
    await asyncio.sleep(seconds)
    busy.append(look(database, client, pid))
    for writer in opened:
        writer.close()
    database.dispose()
    return {"counts": counts, "without": rates(*idle), "with": rates(*busy)}


def rates(before: Sample, after: Sample) -> dict[str, float]:
    seconds = after.at - before.at
    return {
        "transactions a second": round((after.transactions - before.transactions) / seconds, 1),
        "Redis connections": after.connections,
        "cores": round((after.cpu_seconds - before.cpu_seconds) / seconds, 3),
        "memory, MB": round(after.memory_bytes / 1e6, 1),
    }


def report(found: dict[str, Any], followers: int, seconds: float) -> str:
    rows = "\n".join(
        f"| {name} | {value} | {found['with'][name]} |" for name, value in found["without"].items()
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["counts"].items())
    return (
        f"# Idle followers\n\n`python benchmarks/followers.py --followers {followers} --seconds {seconds:g}` on "
        f"{platform.machine()} with {os.cpu_count()} cores; one API process, an\nembedded PostgreSQL and Redis, a worker that "
        f"is stopped. The followers: {kinds}.\n\n"
        f"| of the API process | without followers | with {followers} |\n|---|---|---|\n{rows}\n\n"
        "Transactions are all of the database, those of the process's own caretakers included; connections are all of the "
        "Redis,\nthose of the stopped worker and of the measurement included in both columns.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--followers", type=int, default=2_000, help="how many [2000]")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement [30]")
    parser.add_argument("--output", type=Path, help="write the page here [stdout]")
    args = parser.parse_args()
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 65_536)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    settings = {"VDIFF_MAX_WAIT_SECONDS": "290", "VDIFF_WORKER_STALE_SECONDS": "3600"}
    with whole(
        Path(bundled.folder(bundled.DEFAULT_MODEL)), name=MODEL, slots=1, settings=settings
    ) as parts:
        client = redis.Redis.from_url(parts.redis_url)
        found = asyncio.run(measure(parts, client, args.followers, args.seconds))
        client.close()
    page = report(found, args.followers, args.seconds)
    if args.output is None:
        print(page)
    else:
        args.output.write_text(page)
    cost = found["with"]
    added = cost["Redis connections"] - found["without"]["Redis connections"]
    if cost["transactions a second"] > BOUND_TRANSACTIONS or added > BOUND_CONNECTIONS:
        raise SystemExit("idle followers cost more than they may")


if __name__ == "__main__":
    main()
