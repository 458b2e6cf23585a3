"""The overview: real counts, a stream that says what changed, and nothing of one key's shown to
another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.conftest import ROOT, ApiProcess, Served, eventually
from tests.integration.test_api_jobs import chat_job

pytestmark = pytest.mark.integration


def test_counts_workers_and_pace(served: Served) -> None:
    before = served.client.get("/v1/overview").json()
    for _ in range(3):
        assert (
            served.client.post(
                "/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"}
            ).status_code
            == 200
        )

    def counted() -> Any:
        now = served.client.get("/v1/overview").json()
        return now if now["jobs"]["succeeded"] >= before["jobs"]["succeeded"] + 3 else None

    now = eventually(counted)
    assert now["scope"] == "all" and set(now["jobs"]) >= {"queued", "running", "failed"}
    (worker,) = [w for w in now["workers"] if w["state"] == "ready"]
    assert (worker["model"], worker["slots"], worker["device"]) == ("vdiff-tiny", 4, "cpu")
    assert worker["hostname"] and worker["memory_bytes"] > 10 << 20

    def worked() -> bool:
        served.client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"})
        pace = served.client.get("/v1/overview").json()["pace"]
        return bool(
            pace["tokens_per_second"]
            and pace["batch"]
            and pace["step_ms"]
            and pace["tokens_per_forward"]
        )

    eventually(worked, what="the pace of a worker that works")


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    kind = ""
    for line in lines:
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: ") and kind == "overview":
            yield json.loads(line[6:])


def test_the_stream_says_what_changed(served: Served) -> None:
    with served.client.stream("GET", "/v1/overview/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = events(answer.iter_lines())
        first = next(seen)
        served.client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"})
        for _ in range(50):
            if next(seen)["jobs"]["succeeded"] > first["jobs"]["succeeded"]:
                return
    raise AssertionError("the stream did not tell of the job")


def test_a_key_sees_its_own_jobs_and_no_machine(served: Served, tmp_path: Path) -> None:
    env = {
        "VDIFF_DATABASE_URL": served.jobs.database_url,
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
    }

    def new_key(name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vdiff", "keys", "create", name],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    api = ApiProcess(served.jobs, tmp_path / "api.log", auth="required")
    try:
        api.wait_ready()
        keys = [{"authorization": f"Bearer {new_key(name)}"} for name in ("one", "two")]
        assert httpx.get(f"{api.url}/v1/overview").status_code == 401
        asked = {"json": chat_job(), "headers": {**keys[0], "prefer": "wait=30"}}
        assert httpx.post(f"{api.url}/v1/jobs", timeout=40, **asked).status_code == 200  # type: ignore[arg-type]
        shown = [httpx.get(f"{api.url}/v1/overview", headers=key).json() for key in keys]
        assert [s["jobs"]["succeeded"] for s in shown] == [1, 0]
        assert [s["scope"] for s in shown] == ["own", "own"]
        assert shown[0]["workers"] and all(
            w["hostname"] is None and w["pid"] is None for w in shown[0]["workers"]
        )
        assert (
            httpx.get(api.url).status_code == 200
        )  # the page itself is for everybody; what it asks is not
    finally:
        api.end()


def test_events_carry_the_tokens_texts(served: Served) -> None:
    job = served.client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"}).json()
    texts: dict[int, str] = {}
    with served.client.stream("GET", job["urls"]["events"]) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and "positions" in (data := json.loads(line[6:])):
                assert len(data["texts"]) == len(data["tokens"]) == len(data["positions"])
                texts.update(zip(data["positions"], data["texts"], strict=True))
    assert "".join(texts[i] for i in range(job["usage"]["completion_tokens"])) == "42"


def test_the_page_and_its_files(served: Served) -> None:
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in ("app.js", "style.css", "vendor/lit-html.js", "icon.svg"):
        assert served.client.get(f"/dashboard/{name}").status_code == 200
    assert served.client.get("/dashboard/../app.py").status_code == 404
    assert served.client.get("/dashboard/none.js").status_code == 404


def test_rules_explain_their_parameters(served: Served) -> None:
    rules = {rule["name"]: rule for rule in served.client.get("/v1/rules").json()["data"]}
    served_rules = served.client.get("/v1/models").json()["data"][0]["capabilities"]["algorithms"]
    assert set(served_rules) <= set(rules)
    assert all(
        rule["help"] and all(p["help"] for p in rule["parameters"]) for rule in rules.values()
    )
    assert "threshold" in [p["name"] for p in rules["threshold"]["parameters"]]
    assert "steps" not in [p["name"] for p in rules["threshold"]["parameters"]]
