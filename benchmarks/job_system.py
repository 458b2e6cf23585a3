"""Throughput of the job system alone: accepting, the way from claim to end, webhooks, and urgent
jobs before a long queue.

PostgreSQL runs as it does for users, with synchronous_commit on. A model that nobody serves takes
what is only to be accepted.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from report import percentile, progress, say
from servers import Whole, whole
from sqlalchemy import text

from shared import serving
from shared.db.session import Database
from shared.jobs import repository
from shared.model_card import ModelCard
from vdiff import bundled

SERVED, WAITS = "vdiff-tiny", "nobody-serves-this"
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
LIMIT_SECONDS = 1800.0
ENDPOINTS = 16  # receivers, each with its own limit of deliveries at once
# Copies of one accepted job, so that each can really run.
COPIES = """
INSERT INTO jobs (id, tenant, endpoint, model, priority, body, params, prompt_token_ids, tokens)
SELECT 'job_' || lpad(i::text, 26, '0'), :tenant, endpoint, :model, 'bulk', body, params, prompt_token_ids, tokens
FROM jobs, generate_series(1, CAST(:count AS int)) AS i WHERE id = :id
"""


def _job(model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 32, "temperature": 0.0}
    return {"endpoint": "/v1/chat/completions", "body": body, **more}


def _until(check: Callable[[], bool], what: str, every: float = 0.02) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not check():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {LIMIT_SECONDS:g} s: {what}")
        time.sleep(every)


def _register_waiting(database: Database) -> None:
    with database.write() as session:
        row = session.execute(serving.get_model(SERVED)).one()
        session.execute(
            serving.register_model(
                ModelCard.from_json({**row.card, "name": WAITS}), row.tokenizer_files
            )
        )
    time.sleep(1.5)  # what the API trusts a list of models for


def _copies(database: Database, job_id: str, *, model: str, tenant: str, count: int) -> None:
    with database.write() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(
            text(COPIES), {"id": job_id, "model": model, "tenant": tenant, "count": count}
        )


def _commits(database: Database) -> str:
    with database.read() as session:
        return str(session.execute(text("SHOW synchronous_commit")).scalar_one())


def accept(*, jobs: int, clients: int) -> list[dict[str, Any]]:
    """Jobs accepted a second: one request each by several clients, and as lines of a batch."""
    say("accept: starting the servers")
    with whole(bundled.folder(bundled.DEFAULT_MODEL), name=SERVED, slots=4) as parts:
        database = Database(parts.database_url)
        _register_waiting(database)
        single = asyncio.run(_post_all(parts.url, jobs, clients))
        bulk = _batch(parts, database, jobs)
        common = {"jobs": jobs, "synchronous_commit": _commits(database)}
        database.dispose()
    return [
        {"way": f"POST /v1/jobs, {clients} clients", **common, "jobs_per_s": jobs / single},
        {"way": "lines of a batch, checked and stored", **common, "jobs_per_s": jobs / bulk},
    ]


async def _post_all(url: str, jobs: int, clients: int) -> float:
    left = iter(range(jobs))

    async def one(client: httpx.AsyncClient) -> None:
        for _ in left:
            (await client.post("/v1/jobs", json=_job(WAITS))).raise_for_status()

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        (await client.post("/v1/jobs", json=_job(WAITS))).raise_for_status()  # connections, caches
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return time.perf_counter() - began


def _batch(parts: Whole, database: Database, jobs: int) -> float:
    lines = [
        json.dumps(
            {
                "custom_id": str(i),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": _job(WAITS)["body"],
            }
        )
        for i in range(jobs)
    ]
    with httpx.Client(base_url=parts.url, timeout=300) as client:
        upload = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        file = (
            client.post("/v1/files", files=upload, data={"purpose": "batch"})
            .raise_for_status()
            .json()
        )
        began = time.perf_counter()
        made = client.post(
            "/v1/batches",
            json={
                "input_file_id": file["id"],
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            },
        ).raise_for_status()

    def stored() -> bool:
        with database.read() as session:
            query = text("SELECT stored, status FROM batches WHERE id = :id")
            row = session.execute(query, {"id": made.json()["id"]}).one()
        if row.status == "failed":
            raise RuntimeError("the batch was refused")
        return bool(row.stored == jobs)

    _until(stored, "all lines stored")
    return time.perf_counter() - began


def overhead(*, samples: int) -> list[dict[str, Any]]:
    """From claim to end by the database's clock, less what the engine worked: one job at a time."""
    say("overhead: starting the servers")
    rows = []
    with (
        whole(bundled.folder(bundled.DEFAULT_MODEL), name=SERVED, slots=4) as parts,
        httpx.Client(base_url=parts.url, timeout=60) as client,
    ):
        database = Database(parts.database_url)
        for _ in progress(range(samples + 5), samples + 5, "overhead"):
            client.post(
                "/v1/jobs", json=_job(SERVED), headers={"prefer": "wait=30"}
            ).raise_for_status()
        query = "SELECT extract(epoch FROM finished_at - started_at) * 1000 AS held, timing FROM jobs ORDER BY id OFFSET 5"
        with database.read() as session:
            for row in session.execute(text(query)):
                engine = (
                    row.timing["admitted_ms"] + row.timing["prompt_ms"] + row.timing["denoise_ms"]
                )
                rows.append((float(row.held), engine))
        database.dispose()
    over = [held - engine for held, engine in rows]
    return [
        {
            "samples": samples,
            "claim_to_end_p50_ms": percentile([held for held, _ in rows], 0.5),
            "engine_p50_ms": percentile([engine for _, engine in rows], 0.5),
            "overhead_p50_ms": percentile(over, 0.5),
            "overhead_p95_ms": percentile(over, 0.95),
        }
    ]


def webhooks(*, deliveries: int) -> list[dict[str, Any]]:
    """Webhooks delivered a second, signed and recorded, to receivers that answer at once."""
    say("webhooks: starting the servers")
    got = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal got
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                got += 1
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    settings = {"VDIFF_WEBHOOK_ALLOW_PRIVATE": "true"}
    jobs = max(1, deliveries // ENDPOINTS)
    try:
        with (
            whole(
                bundled.folder(bundled.DEFAULT_MODEL),
                name=SERVED,
                slots=4,
                settings=settings,
                more=("deliver",),
            ) as parts,
            httpx.Client(base_url=parts.url, timeout=60) as client,
        ):
            database = Database(parts.database_url)
            _register_waiting(database)
            template = client.post("/v1/jobs", json=_job(WAITS)).raise_for_status().json()["id"]
            _copies(database, template, model=WAITS, tenant="anonymous", count=jobs)
            for number in range(ENDPOINTS):
                url = f"http://127.0.0.1:{receiver.server_port}/{number}"
                body = {"url": url, "events": ["job.cancelled"]}
                client.post("/v1/webhook_endpoints", json=body).raise_for_status()
            began = time.perf_counter()
            with database.write() as session:
                session.execute(
                    repository.cancel_where(
                        repository.JOBS.c.model == WAITS, repository.JOBS.c.id != template
                    )
                )
            _until(lambda: got >= jobs * ENDPOINTS, "all delivered")
            seconds = time.perf_counter() - began
            database.dispose()
    finally:
        receiver.shutdown()
        receiver.server_close()
    return [
        {
            "deliveries": jobs * ENDPOINTS,
            "receivers": ENDPOINTS,
            "deliveries_per_s": jobs * ENDPOINTS / seconds,
        }
    ]


def interactive(*, samples: int, waiting: int) -> list[dict[str, Any]]:
    """Measure a chat alone, and while so many bulk jobs of another key wait and run."""
    say("interactive: starting the servers")
    rows = []
    with (
        whole(bundled.folder(bundled.DEFAULT_MODEL), name=SERVED, slots=4) as parts,
        httpx.Client(base_url=parts.url, timeout=120) as client,
    ):
        database = Database(parts.database_url)
        template = client.post(
            "/v1/jobs", json=_job(SERVED), headers={"prefer": "wait=30"}
        ).raise_for_status()
        for count in (0, waiting):
            if count:
                _copies(database, template.json()["id"], model=SERVED, tenant="bulk", count=count)
                _until(lambda: _counted(database, "running") > 0, "the bulk jobs run")
            took = []
            for _ in progress(range(samples), samples, f"interactive, {count} waiting"):
                began = time.perf_counter()
                client.post("/v1/chat/completions", json=_job(SERVED)["body"]).raise_for_status()
                took.append(1000 * (time.perf_counter() - began))
            rows.append(
                {
                    "bulk_waiting": count,
                    "samples": samples,
                    "p50_ms": percentile(took, 0.5),
                    "p95_ms": percentile(took, 0.95),
                    "bulk_left": _counted(database, "queued"),
                }
            )
        database.dispose()
    return rows


def _counted(database: Database, status: str) -> int:
    with database.read() as session:
        query = text("SELECT count(*) FROM jobs WHERE priority = 'bulk' AND status = :s")
        return int(session.execute(query, {"s": status}).scalar_one())
