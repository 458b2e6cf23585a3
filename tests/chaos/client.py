"""A client of the suite: HTTP to any of the APIs with a tenant's key; the history notes every
answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.records import (
    TERMINAL,
    Accepted,
    CancelAnswered,
    Foreign,
    HealthSeen,
    History,
    Listed,
    RetryAsked,
    Seen,
    digest,
    text_of,
)

TIMEOUT_SECONDS = 15.0
HEALTH_EVERY_SECONDS = 0.5
HEALTH_TIMEOUT_SECONDS = 10.0
PAUSE_SECONDS = (0.1, 0.5)  # after an answer that was none
_END = (
    "status",
    "result",
    "error",
    "usage",
    "timing",
    "diffusion",
    "started_at",
    "finished_at",
    "attempts",
)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A key, and where its webhooks go."""

    name: str  # the tenant as the database calls it
    key: str


@dataclass(frozen=True, slots=True)
class Request:
    """One generation request, and what the checker has to know of it."""

    endpoint: str
    body: Mapping[str, Any]

    @property
    def sign(self) -> str:
        """The same for two requests that must give the same text."""
        return digest(
            [self.endpoint, {k: v for k, v in self.body.items() if k not in ("stream", "metadata")}]
        )

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])

    @property
    def whole(self) -> bool:
        return bool(self.body.get("ignore_eos", False))


class Clients:
    """All clients; one connection pool. Lives in one event loop."""

    def __init__(self, urls: list[str], history: History) -> None:
        self._urls = urls
        self.history = history
        self.stopping = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()

    def count(self, what: str) -> None:
        self.history.answers[what] = self.history.answers.get(what, 0) + 1

    def _url(self, rng: random.Random, path: str) -> str:
        return rng.choice(self._urls) + path

    async def ask(
        self,
        rng: random.Random,
        tenant: Tenant,
        method: str,
        path: str,
        *,
        timeout: float = TIMEOUT_SECONDS,
        headers: Mapping[str, str] = {},
        **given: Any,
    ) -> httpx.Response | None:
        """The answer; None when there was none."""
        sent = {"Authorization": f"Bearer {tenant.key}", **headers}
        try:
            async with asyncio.timeout(timeout + 5):
                answer = await self._http.request(
                    method, self._url(rng, path), headers=sent, timeout=timeout, **given
                )
        except (httpx.TransportError, TimeoutError) as exc:
            self.count(f"none: {type(exc).__name__}")
            return None
        self.count(str(answer.status_code))
        return answer

    async def insist(
        self, rng: random.Random, tenant: Tenant, method: str, path: str, **given: Any
    ) -> httpx.Response | None:
        """Ask until somebody answers with less than 500; None when the run is stopped."""
        while not self.stopping:
            answer = await self.ask(rng, tenant, method, path, **given)
            if answer is not None and answer.status_code < 500 and answer.status_code != 429:
                return answer
            await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))
        return None

    # What is noted

    def accepted(
        self, tenant: Tenant, job_id: str, request: Request, how: str, **more: Any
    ) -> None:
        self.history.accepted.append(
            Accepted(
                time.time(),
                tenant.name,
                job_id,
                request.sign,
                request.max_tokens,
                request.whole,
                how,
                **more,
            )
        )

    def saw(self, asked_at: float, tenant: Tenant, job: Mapping[str, Any]) -> None:
        done = job["status"] in TERMINAL
        end = digest({name: job[name] for name in _END}) if done else ""
        text, usage = text_of(job["result"]), job["usage"]
        seen = Seen(
            asked_at,
            time.time(),
            tenant.name,
            job["id"],
            job["life"],
            job["status"],
            end,
            text,
            usage,
        )
        self.history.seen.append(seen)

    # Health

    async def watch_health(self) -> None:
        """Ask each API how its servers are, again and again, until the run is stopped."""
        async with asyncio.TaskGroup() as group:
            for url in self._urls:
                group.create_task(self._watch_health_of(url))

    async def _watch_health_of(self, url: str) -> None:
        while not self.stopping:
            asked_at = time.time()
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
                    answer = await self._http.get(f"{url}/health", timeout=HEALTH_TIMEOUT_SECONDS)
                body = answer.json()
                seen = HealthSeen(
                    asked_at, time.time(), url, body["database"] == "ok", body["redis"] == "ok"
                )
                self.history.health.append(seen)
            except (httpx.TransportError, TimeoutError, ValueError, KeyError):
                pass  # the API is away, or stands still: that says nothing untrue
            await asyncio.sleep(HEALTH_EVERY_SECONDS)

    # Jobs

    async def look(
        self, rng: random.Random, tenant: Tenant, job_id: str, *, wait: float = 0.0
    ) -> dict[str, Any] | None:
        asked_at = time.time()
        answer = await self.ask(
            rng, tenant, "GET", f"/v1/jobs/{job_id}", params={"wait": wait} if wait else None
        )
        if answer is None or answer.status_code >= 500:
            return None
        if answer.status_code != 200:
            self.count(f"unexpected: GET job {answer.status_code}")
            return None
        job: dict[str, Any] = answer.json()
        self.saw(asked_at, tenant, job)
        return job

    async def until_over(
        self, rng: random.Random, tenant: Tenant, job_id: str
    ) -> dict[str, Any] | None:
        while not self.stopping:
            job = await self.look(rng, tenant, job_id, wait=rng.choice((1, 5, 10)))
            if job is not None and job["status"] in TERMINAL:
                return job
            if job is None:
                await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))
        return None

    async def cancel(
        self, rng: random.Random, tenant: Tenant, job_id: str
    ) -> dict[str, Any] | None:
        """Ask until it is answered."""
        while not self.stopping:
            asked_at = time.time()
            answer = await self.ask(rng, tenant, "POST", f"/v1/jobs/{job_id}/cancel")
            if answer is not None and answer.status_code in (200, 202):
                job: dict[str, Any] = answer.json()
                self.history.cancels.append(
                    CancelAnswered(asked_at, time.time(), job_id, job["life"], job["status"])
                )
                self.saw(asked_at, tenant, job)
                return job
            if answer is not None and answer.status_code < 500:
                self.count(f"unexpected: cancel {answer.status_code}")
                return None
            await asyncio.sleep(rng.uniform(*PAUSE_SECONDS))
        return None

    async def retry(self, rng: random.Random, tenant: Tenant, job_id: str) -> bool:
        """Once; whether it was taken for sure."""
        asked_at = time.time()
        answer = await self.ask(rng, tenant, "POST", f"/v1/jobs/{job_id}/retry")
        self.history.retries.append(
            RetryAsked(time.time(), job_id, None if answer is None else answer.status_code)
        )
        if answer is not None and answer.status_code == 202:
            self.saw(asked_at, tenant, answer.json())
            return True
        return False

    async def peek(self, rng: random.Random, stranger: Tenant, job_id: str) -> None:
        """Try what must be 404."""
        method, path = rng.choice(
            (
                ("GET", ""),
                ("GET", "/result"),
                ("GET", "/attempts"),
                ("POST", "/cancel"),
                ("POST", "/retry"),
                ("POST", "/replay"),
                ("DELETE", ""),
            )
        )
        answer = await self.ask(rng, stranger, method, f"/v1/jobs/{job_id}{path}")
        if answer is not None:
            self.history.foreign.append(
                Foreign(stranger.name, f"{method} /v1/jobs/{job_id}{path}", answer.status_code)
            )

    async def list_jobs(self, rng: random.Random, tenant: Tenant) -> None:
        answer = await self.ask(rng, tenant, "GET", "/v1/jobs", params={"limit": 50})
        if answer is not None and answer.status_code == 200:
            self.history.listed.append(
                Listed(tenant.name, tuple(job["id"] for job in answer.json()["data"]))
            )

    @asynccontextmanager
    async def stream(
        self, rng: random.Random, tenant: Tenant, request: Request, headers: Mapping[str, str]
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[dict[str, Any] | None]]]:
        """A streamed answer and its chunks, None for [DONE]. Raises httpx.TransportError,
        TimeoutError.
        """
        sent = {"Authorization": f"Bearer {tenant.key}", **headers}
        url, body = self._url(rng, request.endpoint), {**request.body, "stream": True}
        async with self._http.stream("POST", url, json=body, headers=sent) as answer:
            self.count(str(answer.status_code))
            yield answer, _chunks(answer)


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)
