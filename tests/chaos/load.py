"""The load: jobs in every way to submit, await, follow, cancel and retry them. The seed alone
decides.

Job number i draws from a random generator of its own, so the same seed gives the same jobs whatever
the faults did to others; only how they interleave is the machine's.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import httpx

from tests.chaos.client import PAUSE_SECONDS, Clients, Request, Tenant
from tests.chaos.hooks import KILLER_SEED
from tests.chaos.records import BatchEnded, Streamed

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EVENT_TYPES = (
    "job.queued",
    "job.started",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.expired",
)
PROMPTS = (
    "a small step",
    "the queue is long",
    "what is 17 + 25?",
    "once more",
    "nothing is lost",
    "tell me",
    "stop",
    "go on then",
)
LENGTHS = (4, 8, 16, 24, 40)
SEEDS = (1, 2, 3)
ENDLESS_TOKENS = 320  # runs for many seconds, if nobody cancels it
BATCH_LINES = (5, 30)


Scenario = Callable[["Load", random.Random, Tenant, int], Awaitable[None]]


class Load:
    def __init__(
        self,
        clients: Clients,
        tenants: list[Tenant],
        *,
        model: str,
        seed: int,
        jobs: int,
        concurrency: int,
        receiver_url: str,
    ) -> None:
        self._clients = clients
        self._tenants = tenants
        self._model, self._seed, self.jobs = model, seed, jobs
        self._concurrency = concurrency
        self._receiver_url = receiver_url
        self.begun = self.over = 0  # jobs; read by the main thread
        self._numbers = iter(range(10 * jobs))
        self._extra: list[Future[None]] = []

    async def run(self) -> None:
        """Until all jobs were submitted and their clients are content, or `clients.stopping`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._client())

    async def _client(self) -> None:
        while self.begun < self.jobs and not self._clients.stopping:
            rng = random.Random(f"{self._seed}/{next(self._numbers)}")
            scenario, weight = rng.choices(_SCENARIOS, [w for _, w in _SCENARIOS])[0]
            del weight
            count = 1
            if scenario is Load.batch:
                count = min(rng.randint(*BATCH_LINES), max(1, self.jobs - self.begun))
            self.begun += count
            await scenario(self, rng, rng.choice(self._tenants), count)
            self.over += count

    @property
    def extra_open(self) -> int:
        """Return how many jobs that faults began are not over; read by the main thread."""
        return sum(not future.done() for future in self._extra)

    def begin_extra(self, scenario: Scenario, which: int, loop: asyncio.AbstractEventLoop) -> None:
        """Begin a scenario that belongs to a fault, from the main thread; it is not one of `jobs`."""
        rng = random.Random(f"{self._seed}/extra {which}/{len(self._extra)}")
        work = scenario(self, rng, rng.choice(self._tenants), 1)
        self._extra.append(asyncio.run_coroutine_threadsafe(_awaited(work), loop))

    # Requests

    def _request(self, rng: random.Random) -> Request:
        endpoint = rng.choice((CHAT, COMPLETIONS))
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": rng.choice(LENGTHS),
            "seed": rng.choice(SEEDS),
            "temperature": rng.choice((0.0, 0.8)),
            "ignore_eos": rng.random() < 0.5,
        }
        prompt = rng.choice(PROMPTS)
        body.update(
            {"messages": [{"role": "user", "content": prompt}]}
            if endpoint == CHAT
            else {"prompt": prompt}
        )
        return Request(endpoint, body)

    def _endless(self, rng: random.Random) -> Request:
        body = {
            "model": self._model,
            "prompt": rng.choice(PROMPTS),
            "max_tokens": ENDLESS_TOKENS,
            "seed": 1,
            "ignore_eos": True,
        }
        return Request(COMPLETIONS, {**body, "diffusion": {"block_length": 4}})

    def _job(
        self, rng: random.Random, tenant: Tenant, request: Request
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A native job's body, and what to note of it."""
        job: dict[str, Any] = {
            "endpoint": request.endpoint,
            "body": request.body,
            "priority": rng.choice(("interactive", "normal", "bulk")),
        }
        noted: dict[str, Any] = {}
        if rng.random() < 0.3:
            events = sorted(rng.sample(EVENT_TYPES, rng.randint(1, 6)))
            job["webhook"] = {
                "url": f"{self._receiver_url}/own/{tenant.name}",
                "events": events,
                "inline_result": rng.random() < 0.5,
            }
            noted["hooks"] = tuple(events)
        if rng.random() < 0.2:
            job["metadata"] = {"watched": "yes"}
            noted["labelled"] = True
        return job, noted

    async def _submit(
        self,
        rng: random.Random,
        tenant: Tenant,
        request: Request,
        how: str,
        *,
        key: str | None = None,
        wait: int | None = None,
    ) -> str | None:
        """The job's id once somebody accepted it. Without a key a lost answer may leave a job
        behind that nobody knows.
        """
        job, noted = self._job(rng, tenant, request)
        return await self._send(rng, tenant, request, job, noted, how, key=key, wait=wait)

    async def _send(
        self,
        rng: random.Random,
        tenant: Tenant,
        request: Request,
        job: dict[str, Any],
        noted: dict[str, Any],
        how: str,
        *,
        key: str | None = None,
        wait: int | None = None,
    ) -> str | None:
        headers = {} if key is None else {"Idempotency-Key": key}
        if wait is not None:
            headers["Prefer"] = f"wait={wait}"
        asked_at = time.time()
        answer = await self._clients.insist(
            rng, tenant, "POST", "/v1/jobs", json=job, headers=headers
        )
        if answer is None:
            return None
        if answer.status_code not in (200, 202):
            self._clients.count(f"unexpected: submit {answer.status_code}")
            return None
        shown = answer.json()
        self._clients.accepted(tenant, shown["id"], request, how, idempotency_key=key, **noted)
        self._clients.saw(asked_at, tenant, shown)
        return str(shown["id"])

    # Scenarios

    async def plain(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        job_id = await self._submit(rng, tenant, self._request(rng), "plain")
        if job_id is not None:
            await self._clients.until_over(rng, tenant, job_id)

    async def prefer_wait(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        job_id = await self._submit(
            rng, tenant, self._request(rng), "prefer-wait", wait=rng.randint(1, 5)
        )
        if job_id is not None:
            await self._clients.until_over(rng, tenant, job_id)

    async def idempotent(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """The same request several times, at once and later."""
        request, key = self._request(rng), str(uuid.UUID(int=rng.getrandbits(128)))
        job, noted = self._job(rng, tenant, request)
        again = [random.Random(rng.random()) for _ in range(rng.randint(1, 3))]
        ids = await asyncio.gather(
            *(self._send(one, tenant, request, job, noted, "idempotent", key=key) for one in again)
        )
        known = next((job_id for job_id in ids if job_id is not None), None)
        if known is not None:
            await self._clients.until_over(rng, tenant, known)
            await self._send(rng, tenant, request, job, noted, "idempotent", key=key)

    async def cancelled(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A cancel at every moment: at once, in the queue, in mid-run, when it is over."""
        request = self._endless(rng) if rng.random() < 0.3 else self._request(rng)
        job_id = await self._submit(rng, tenant, request, "cancelled")
        if job_id is None:
            return
        await asyncio.sleep(rng.choice((0.0, 0.0, rng.uniform(0, 0.1), rng.uniform(0, 2))))
        await self._clients.cancel(rng, tenant, job_id)
        await self._clients.until_over(rng, tenant, job_id)

    async def retried(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """Cancelled, then given another life; perhaps more than one."""
        job_id = await self._submit(rng, tenant, self._request(rng), "retried")
        if job_id is None:
            return
        for _ in range(rng.randint(1, 3)):
            await self._clients.cancel(rng, tenant, job_id)
            job = await self._clients.until_over(rng, tenant, job_id)
            if job is None or job["status"] == "succeeded":
                return
            await self._clients.retry(rng, tenant, job_id)
        await self._clients.until_over(rng, tenant, job_id)

    async def late(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A deadline that most miss; then a life without it."""
        request = self._request(rng)
        job, noted = self._job(rng, tenant, request)
        job["deadlines"] = rng.choice(
            ({"max_run_seconds": 0.001}, {"start_by": int(time.time()) + 1})
        )
        noted["start_by"] = job["deadlines"].get("start_by")
        job_id = await self._send(rng, tenant, request, job, noted, "late")
        if job_id is None:
            return
        over = await self._clients.until_over(rng, tenant, job_id)
        if over is not None and over["status"] == "expired" and "start_by" in job["deadlines"]:
            await self._clients.retry(rng, tenant, job_id)
            await self._clients.until_over(rng, tenant, job_id)

    async def overdue(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A deadline that passes while no worker lives."""
        request = self._request(rng)
        job, noted = self._job(rng, tenant, request)
        noted["start_by"] = int(time.time()) + rng.randint(1, 2)
        job["deadlines"] = {"start_by": noted["start_by"]}
        job_id = await self._send(rng, tenant, request, job, noted, "overdue")
        if job_id is not None:
            await self._clients.until_over(rng, tenant, job_id)

    async def endless(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A job that runs for many seconds, so that a worker is busy during a fault."""
        job_id = await self._submit(rng, tenant, self._endless(rng), "endless")
        if job_id is not None:
            await self._clients.until_over(rng, tenant, job_id)

    async def killer(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A job that ends each worker that runs it."""
        body = {
            "model": self._model,
            "prompt": rng.choice(PROMPTS),
            "max_tokens": ENDLESS_TOKENS,
            "seed": KILLER_SEED,
            "ignore_eos": True,
            "diffusion": {"block_length": 4},
        }
        request = Request(COMPLETIONS, body)
        job, noted = self._job(rng, tenant, request)
        noted["kills"] = True
        job_id = await self._send(rng, tenant, request, job, noted, "killer")
        if job_id is not None:
            await self._clients.until_over(rng, tenant, job_id)

    async def replayed(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        request = self._request(rng)
        job_id = await self._submit(rng, tenant, request, "replayed")
        first = None if job_id is None else await self._clients.until_over(rng, tenant, job_id)
        if first is None or first["status"] != "succeeded":
            return
        asked_at = time.time()
        answer = await self._clients.insist(rng, tenant, "POST", f"/v1/jobs/{job_id}/replay")
        if answer is None or answer.status_code != 202:
            return
        self._clients.accepted(tenant, answer.json()["id"], request, "replay")
        self._clients.saw(asked_at, tenant, answer.json())
        over = await self._clients.until_over(rng, tenant, answer.json()["id"])
        if (
            over is not None
            and over["status"] == "succeeded"
            and over["replay"]["same_text"] is not True
        ):
            self._clients.count(f"unexpected: replay says {over['replay']}")

    async def curious(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """Another tenant tries its luck with the id."""
        job_id = await self._submit(rng, tenant, self._request(rng), "curious")
        if job_id is None:
            return
        stranger = rng.choice([t for t in self._tenants if t.name != tenant.name])
        await self._clients.peek(rng, stranger, job_id)
        await self._clients.until_over(rng, tenant, job_id)
        await self._clients.peek(rng, stranger, job_id)
        await self._clients.list_jobs(rng, stranger)

    async def sync(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """An OpenAI call; the client may hang up, and comes back as its SDK would."""
        request = self._request(rng)
        patience = rng.choice((0.05, rng.uniform(0.1, 1.0), 60.0, 60.0))
        headers = (
            {"Idempotency-Key": str(uuid.UUID(int=rng.getrandbits(128)))}
            if rng.random() < 0.5
            else {}
        )
        for tries in range(3):
            again = {"x-stainless-retry-count": str(tries)}
            answer = await self._clients.ask(
                rng,
                tenant,
                "POST",
                request.endpoint,
                json=request.body,
                headers={**headers, **again},
                timeout=patience,
            )
            if answer is not None and "x-job-id" in answer.headers:
                job_id = answer.headers["x-job-id"]
                self._clients.accepted(
                    tenant, job_id, request, "sync", idempotency_key=headers.get("Idempotency-Key")
                )
                job = await self._clients.until_over(rng, tenant, job_id)
                if answer.status_code == 200 and job is not None and job["result"] != answer.json():
                    self._clients.count("unexpected: a sync answer is not the job's result")
                return
            if rng.random() < 0.3 or self._clients.stopping:
                return  # gone for good
            patience = 60.0
            await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))

    async def streamed(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        """A stream, read to its end or left in the middle."""
        request = self._request(rng)
        leaves_after = rng.choice((None, None, rng.randint(0, 4)))
        headers = (
            {"Idempotency-Key": str(uuid.UUID(int=rng.getrandbits(128)))}
            if rng.random() < 0.3
            else {}
        )
        job_id, text, complete = None, "", False
        try:
            async with self._clients.stream(rng, tenant, request, headers) as (answer, chunks):
                if answer.status_code != 200:
                    return
                job_id = answer.headers["x-job-id"]
                self._clients.accepted(
                    tenant,
                    job_id,
                    request,
                    "stream",
                    idempotency_key=headers.get("Idempotency-Key"),
                )
                seen, failed = 0, False
                async for chunk in chunks:
                    if chunk is None:
                        complete = not failed
                        break
                    failed |= "error" in chunk
                    for choice in chunk.get("choices", ()):
                        text += (
                            choice["delta"].get("content") or ""
                            if "delta" in choice
                            else choice["text"]
                        )
                    seen += 1
                    if leaves_after is not None and seen > leaves_after:
                        break
        except (httpx.TransportError, TimeoutError) as exc:
            self._clients.count(f"none: {type(exc).__name__}")
        if job_id is not None:
            self._clients.history.streams.append(Streamed(job_id, text, complete))
            await self._clients.until_over(rng, tenant, job_id)

    async def batch(self, rng: random.Random, tenant: Tenant, count: int) -> None:
        lines = {f"line-{k}": _as_chat(self._request(rng)) for k in range(count)}
        text = "\n".join(
            json.dumps({"custom_id": k, "method": "POST", "url": CHAT, "body": r.body})
            for k, r in lines.items()
        )
        key = str(uuid.UUID(int=rng.getrandbits(128)))
        ask = self._clients.insist
        file = await ask(
            rng,
            tenant,
            "POST",
            "/v1/files",
            files={"file": ("requests.jsonl", text.encode())},
            data={"purpose": "batch"},
        )
        if file is None or file.status_code != 200:
            return self._clients.count("unexpected: no file") if file is not None else None
        body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        made = await ask(
            rng, tenant, "POST", "/v1/batches", json=body, headers={"Idempotency-Key": key}
        )
        if made is None or made.status_code != 200:
            return self._clients.count("unexpected: no batch") if made is not None else None
        batch = made.json()
        if rng.random() < 0.15:
            await asyncio.sleep(
                rng.choice((0.0, rng.uniform(0, 3)))
            )  # half of them before the lines are checked
            await ask(rng, tenant, "POST", f"/v1/batches/{batch['id']}/cancel")
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            answer = await ask(rng, tenant, "GET", f"/v1/batches/{batch['id']}")
            if answer is None or answer.status_code != 200:
                return None
            batch = answer.json()
        files = []
        for name in ("output_file_id", "error_file_id"):
            content = (
                await ask(rng, tenant, "GET", f"/v1/files/{batch[name]}/content")
                if batch[name]
                else None
            )
            files.append(
                tuple(json.loads(line) for line in content.text.splitlines())
                if content is not None
                else ()
            )
        self._clients.history.batches.append(
            BatchEnded(
                tenant.name, batch["id"], {k: r.sign for k, r in lines.items()}, batch, *files
            )
        )
        return None


def _as_chat(request: Request) -> Request:
    body = dict(request.body)
    if "prompt" in body:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    return Request(CHAT, body)


async def _awaited(work: Awaitable[None]) -> None:
    await work


_SCENARIOS: list[tuple[Scenario, float]] = [
    (Load.plain, 20),
    (Load.prefer_wait, 10),
    (Load.idempotent, 12),
    (Load.cancelled, 12),
    (Load.retried, 6),
    (Load.late, 4),
    (Load.replayed, 4),
    (Load.curious, 6),
    (Load.sync, 14),
    (Load.streamed, 10),
    (Load.batch, 2),
]
