"""What containers are told, run as plain processes: the manifests' own commands and variables, as the user 10001 where we may,
in a folder that cannot be written. Only addresses and ports differ."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import text

from migrations.run import head_revision
from tests.integration.conftest import ROOT, Jobs, create_database, drop_database, eventually
from tests.integration.test_api_jobs import chat_job
from tests.unit.test_kubernetes import CONTAINERS, KUBERNETES, variables, words
from vdiff import bundled
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
KEY = {"authorization": "Bearer k"}
USER = 10001
Run = Callable[..., "subprocess.Popen[bytes]"]


def container(part: str) -> dict[str, Any]:
    return next(c for name, _, c in CONTAINERS if name.startswith(part))


def may_be_another() -> bool:
    """Whether we may become the containers' user, and it may read this checkout and its environment."""
    if os.geteuid() != 0:
        return False
    program = "import sys, os; sys.exit(not (os.access(sys.argv[1], os.R_OK) and os.access(sys.argv[2], os.X_OK)))"
    command = ["/usr/bin/python3", "-c", program, str(ROOT / "shared/settings.py"), sys.executable]
    with suppress(OSError):
        done = subprocess.run(command, user=USER, group=USER, extra_groups=[], cwd="/", check=False)
        return done.returncode == 0
    return False


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    name = f"vdiff_deploy_{os.getpid()}"
    yield create_database(postgres_url, name)
    drop_database(postgres_url, name)


@pytest.fixture
def run(database_url: str, redis_url: str) -> Iterator[Run]:
    """Start a container's command; keywords replace variables."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="vdiff-pod-", ignore_cleanup_errors=True) as folder:
        tmp = Path(folder)
        tmp.chmod(0o777)

        def start(shown: dict[str, Any], command: list[str], **replaced: str) -> subprocess.Popen[bytes]:
            env = {
                **variables(shown),
                "VDIFF_DATABASE_URL": database_url,
                "VDIFF_REDIS_URL": redis_url.rsplit("/", 1)[0] + "/9",
                "VDIFF_HOST": "127.0.0.1",
                "HF_HOME": str(tmp),
                "HOME": "/nonexistent",
                "TMPDIR": str(tmp),
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                **replaced,
            }
            user = {"user": USER, "group": USER, "extra_groups": []} if may_be_another() else {}
            log = (tmp / f"{len(started)}.log").open("wb")
            process = subprocess.Popen(command, env=env, cwd="/", stdout=log, stderr=log, **user)  # type: ignore[call-overload]
            log.close()
            process.log = Path(log.name)
            started.append(process)
            return process  # type: ignore[no-any-return]

        yield start
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait(10)


def said(process: Any) -> str:
    return str(process.log.read_text(errors="replace")[-3000:])


def answers(url: str, status: int = 200) -> Callable[[], bool]:
    def ask() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(url, timeout=5, headers=KEY).status_code == status
        return False

    return ask


def test_standalone_as_processes(run: Run, database_url: str) -> None:
    migrate, api, worker = (container(f"standalone/{name}.yaml") for name in ("migrate", "api", "worker"))
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"

    early = run(api, words(api), VDIFF_PORT=port)  # before the schema is there: one line, and Kubernetes tries again
    assert early.wait(60) == 2, said(early)
    done = run(migrate, words(migrate))
    assert done.wait(60) == 0 and head_revision() in said(done)
    again = run(migrate, words(migrate))
    assert again.wait(60) == 0

    served = run(api, words(api), VDIFF_PORT=port)
    eventually(answers(url + api["livenessProbe"]["httpGet"]["path"]), seconds=60, what="live")
    assert httpx.get(url + api["readinessProbe"]["httpGet"]["path"]).status_code == 503  # no model yet
    working = run(worker, words(worker), VDIFF_DRAIN_SECONDS="2")
    probe = worker["startupProbe"]["exec"]["command"]
    eventually(lambda: run(worker, probe).wait(60) == 0 or working.poll(), seconds=90, what="the worker's probe")
    assert working.poll() is None, said(working)
    eventually(answers(url + api["readinessProbe"]["httpGet"]["path"]), seconds=30, what="ready")

    assert httpx.post(f"{url}/v1/jobs", json=chat_job()).status_code == 401
    job = httpx.post(f"{url}/v1/jobs", json=chat_job(), headers={**KEY, "prefer": "wait=30"}, timeout=60).json()
    assert job["result"]["choices"][0]["message"]["content"] == "42"

    for process in (working, served):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, said(process)
    assert run(worker, probe).wait(60) == 1  # gone in good order


@pytest.mark.parametrize("where", ["kserve/serving-runtime.yaml", "llmd/deployment.yaml"])
def test_a_pod_of_api_and_worker(run: Run, where: str) -> None:
    shown = container(where)
    port = free_port()
    model = str(bundled.folder(bundled.DEFAULT_MODEL))
    data = tempfile.mkdtemp(prefix="vdiff-pod-")
    os.chmod(data, 0o777)
    ours = {
        "--port": str(port),
        "--host": "127.0.0.1",
        "--model": model,
        "--served-model-name": "vdiff-tiny",
        "--data-dir": f"{data}/vdiff",
    }
    command = [
        f"{flag}={ours.get(flag, value)}" if sign else flag
        for flag, sign, value in (word.partition("=") for word in words(shown))
    ]
    pod = run(shown, command, VDIFF_MODEL=model, VDIFF_SERVED_MODEL_NAME="vdiff-tiny")
    url = f"http://127.0.0.1:{port}"
    eventually(answers(url + shown["readinessProbe"]["httpGet"]["path"]), seconds=120, what="ready")
    job = httpx.post(f"{url}/v1/jobs", json=chat_job(), headers={**KEY, "prefer": "wait=30"}, timeout=60).json()
    assert job["result"]["choices"][0]["message"]["content"] == "42", said(pod)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(40) == 0, said(pod)


def test_keda_asks_for_the_age_of_the_oldest_job(jobs: Jobs) -> None:
    scaled = yaml.safe_load((KUBERNETES / "standalone/scaling.yaml").read_text(encoding="utf-8"))
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    jobs.model = "vdiff-tiny"

    def age() -> int:
        with jobs.database.read() as session:
            return int(session.execute(text(query.replace(":", r"\:"))).scalar_one())

    assert age() == 0
    job_id = jobs.submit(push=0)
    aged = "UPDATE jobs SET queued_at = now() - interval '90 s' WHERE id = :id RETURNING id"
    jobs.execute(text(aged).bindparams(id=job_id))
    assert age() >= 90
    jobs.model = "another"
    other = jobs.submit(push=0)
    jobs.execute(text(aged.replace("90", "900")).bindparams(id=other))
    assert 90 <= age() < 900
