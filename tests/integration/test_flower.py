"""Flower as `vdiff flower` runs it: behind its password, with our tasks by name and our queues."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import ROOT, Served, eventually
from tests.integration.test_api_jobs import chat_job
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
LOGIN = ("visitor", "let-me-in")


def test_flower_shows_tasks_and_queues_to_who_has_the_password(
    served: Served, tmp_path: Path
) -> None:
    port = free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env |= {
        "VDIFF_REDIS_URL": served.jobs.redis_url,
        "VDIFF_FLOWER_PORT": str(port),
        "VDIFF_FLOWER_BASIC_AUTH": ":".join(LOGIN),
    }
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vdiff", "flower"], cwd=ROOT, env=env, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"

    def get(path: str, **more: Any) -> httpx.Response | None:
        with suppress(httpx.HTTPError):
            return httpx.get(url + path, timeout=120, **more)
        return None

    try:
        eventually(
            lambda: (r := get("/healthcheck")) is not None and r.status_code == 200,
            seconds=60,
            what="Flower",
        )
        for path in ("/", "/workers", "/tasks", "/broker", "/api/tasks"):
            refused = get(path)
            assert refused is not None and refused.status_code == 401, path
        assert "let-me-in" not in " ".join(
            Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        )
        login = httpx.BasicAuth(*LOGIN)

        def seen() -> bool:
            job = served.client.post(
                "/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"}
            ).json()
            tasks = get("/api/tasks", auth=login)
            assert tasks is not None and tasks.status_code == 200
            shown = tasks.json().values()
            return any(
                t["name"] == "vdiff.generate" and job["id"] in (t["args"] or "") for t in shown
            )

        eventually(seen, seconds=60, what="the job's task, by name and with its id")

        def queues() -> bool:
            answer = get("/api/queues/length", auth=login)
            names = (
                {q["name"] for q in answer.json()["active_queues"]} if answer is not None else set()
            )
            return {f"vdiff.vdiff-tiny.{p}" for p in ("interactive", "normal", "bulk")} <= names

        eventually(queues, seconds=60, what="our queues")
    finally:
        process.kill()
        process.wait(10)
