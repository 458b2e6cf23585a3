"""Containers as plain processes: the manifests' own commands and variables, as the user 10001 where
possible, in a read-only folder. Only addresses and ports differ.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
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


@pytest.fixture(scope="module")
def another_user() -> Iterator[dict[str, str] | None]:
    """Variables with which the containers' user runs our Python; None where the tests may not
    become that user.

    A Python under /root is out of its reach: then a tree of links to it is not.
    """
    with tempfile.TemporaryDirectory(prefix="vdiff-python-", ignore_cleanup_errors=True) as folder:
        yield (
            None
            if os.geteuid() != 0
            else next(filter(runs_as_another, pythons(Path(folder))), None)
        )


def pythons(folder: Path) -> Iterator[dict[str, str]]:
    yield {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    folder.chmod(0o755)
    linked, leave_out = folder / "python", shutil.ignore_patterns("test", "site-packages", "share")
    with suppress(shutil.Error, OSError):  # another file system
        shutil.copytree(
            sys.base_prefix, linked, copy_function=os.link, symlinks=True, ignore=leave_out
        )
        program = folder / "vdiff"
        program.write_text(
            f'#!/bin/sh\nexec {linked}/bin/python3.{sys.version_info.minor} -m vdiff "$@"\n'
        )
        program.chmod(0o755)
        yield {
            "PATH": f"{folder}:/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}",
            "PYTHONHOME": str(linked),
            "LD_LIBRARY_PATH": str(linked / "lib"),
        }


def runs_as_another(env: dict[str, str]) -> bool:
    with suppress(OSError):
        command = ["/bin/sh", "-c", "exec vdiff version"]
        return (
            subprocess.run(
                command, **as_user(), cwd="/", env=env, capture_output=True, check=False
            ).returncode
            == 0
        )
    return False


def as_user() -> dict[str, Any]:
    return {"user": USER, "group": USER, "extra_groups": []}


def written_elsewhere(since: float) -> list[str]:
    """Return the files of the containers' user in places that are writable for all, beside the
    folders that replace mounts.
    """
    found, folders = [], ["/tmp", "/var/tmp"]
    while folders:
        folder = folders.pop()
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    if (
                        about.st_uid == USER
                        and about.st_mtime >= since
                        and "vdiff-pod-" not in entry.path
                    ):
                        found.append(entry.path)
                    if (
                        stat.S_ISDIR(about.st_mode)
                        and about.st_mode & stat.S_IWOTH
                        and "vdiff-pod-" not in entry.path
                    ):
                        folders.append(entry.path)
    return found


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    name = f"vdiff_deploy_{os.getpid()}"
    yield create_database(postgres_url, name)
    drop_database(postgres_url, name)


@pytest.fixture
def run(database_url: str, redis_url: str, another_user: dict[str, str] | None) -> Iterator[Run]:
    """Start a container's command; keywords replace variables."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="vdiff-pod-", ignore_cleanup_errors=True) as folder:
        tmp = Path(folder)
        tmp.chmod(0o777)

        def start(
            shown: dict[str, Any], command: list[str], **replaced: str
        ) -> subprocess.Popen[bytes]:
            given = variables(shown)
            env = {
                **given,
                "VDIFF_DATABASE_URL": database_url,
                "VDIFF_REDIS_URL": redis_url.rsplit("/", 1)[0] + "/9",
                "VDIFF_HOST": "127.0.0.1",
                # The mount of models, where there is one; /tmp is the other. No HOME: nothing may
                # need one.
                **({"HF_HOME": str(tmp)} if "HF_HOME" in given else {}),
                "TMPDIR": str(tmp),
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                **replaced,
            }
            if another_user is not None:
                env |= another_user
                command = [
                    "/bin/sh",
                    "-c",
                    'exec "$@"',
                    "sh",
                    *command,
                ]  # which looks for it on that user's PATH
            user = {} if another_user is None else as_user()
            log = (tmp / f"{len(started)}.log").open("wb")
            process = subprocess.Popen(command, env=env, cwd="/", stdout=log, stderr=log, **user)
            log.close()
            process.log = Path(log.name)
            started.append(process)
            return process

        began = time.time()
        yield start
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait(10)
        if another_user is not None:
            assert written_elsewhere(began) == [], (
                "a read-only container has only its mounts to write to"
            )


def said(process: Any) -> str:
    return str(process.log.read_text(errors="replace")[-3000:])


def answers(url: str, status: int = 200) -> Callable[[], bool]:
    def ask() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(url, timeout=120, headers=KEY).status_code == status
        return False

    return ask


def test_what_is_written_beside_the_mounts_is_noticed(another_user: dict[str, str] | None) -> None:
    if another_user is None:
        pytest.skip("only root may become the containers' user")
    began, stray = time.time(), Path(tempfile.gettempdir()) / f"stray-{os.getpid()}"
    try:
        subprocess.run(["/bin/sh", "-c", f": > {stray}"], check=True, cwd="/", **as_user())
        assert written_elsewhere(began - 1) == [str(stray)]
    finally:
        stray.unlink(missing_ok=True)


def test_standalone_as_processes(run: Run, database_url: str) -> None:
    names = ("migrate", "api", "worker", "deliver")
    migrate, api, worker, deliver = (container(f"standalone/{name}.yaml") for name in names)
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"

    early = run(
        api, words(api), VDIFF_PORT=port
    )  # before the schema is there: one line, and Kubernetes tries again
    assert early.wait(240) == 2, said(early)
    done = run(migrate, words(migrate))
    assert done.wait(240) == 0 and head_revision() in said(done)
    again = run(migrate, words(migrate))
    assert again.wait(240) == 0

    served = run(api, words(api), VDIFF_PORT=port)
    eventually(answers(url + api["livenessProbe"]["httpGet"]["path"]), seconds=60, what="live")
    assert (
        httpx.get(url + api["readinessProbe"]["httpGet"]["path"]).status_code == 503
    )  # no model yet
    delivering = run(deliver, words(deliver))
    started, probe = (
        worker[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness")
    )
    assert run(worker, started).wait(240) == 1
    working = run(worker, words(worker), VDIFF_DRAIN_SECONDS="2")
    eventually(
        lambda: run(worker, started).wait(240) == 0 or working.poll(),
        seconds=90,
        what="the worker's probe",
    )
    assert working.poll() is None, said(working)
    assert "worker_ready" in said(working) and run(worker, probe).wait(240) == 0, (
        "it turns once it is there for jobs"
    )
    assert run(worker, worker["livenessProbe"]["exec"]["command"]).wait(240) == 0
    eventually(answers(url + api["readinessProbe"]["httpGet"]["path"]), seconds=30, what="ready")

    assert httpx.post(f"{url}/v1/jobs", json=chat_job()).status_code == 401
    job = httpx.post(
        f"{url}/v1/jobs", json=chat_job(), headers={**KEY, "prefer": "wait=30"}, timeout=60
    ).json()
    assert job["result"]["choices"][0]["message"]["content"] == "42"

    eventually(lambda: "delivery_ready" in said(delivering), seconds=30, what="deliver")
    for kind in ("startup", "liveness", "readiness"):
        asked = run(deliver, deliver[f"{kind}Probe"]["exec"]["command"])
        assert asked.wait(240) == 0, f"{kind}: {said(asked)}"
    doctor = run(
        api, ["vdiff", "doctor"], VDIFF_PORT=port
    )  # as `kubectl exec deploy/vdiff-api -- vdiff doctor`
    assert doctor.wait(240) == 0, said(doctor)
    for process in (working, served, delivering):
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0, said(process)
    assert run(worker, probe).wait(240) == 1  # gone in good order


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
        "--device": "cpu",  # there is no GPU here
    }
    command = [
        f"{flag}={ours.get(flag, value)}" if sign else flag
        for flag, sign, value in (word.partition("=") for word in words(shown))
    ]
    started = shown["startupProbe"]["exec"]["command"]
    assert run(shown, started).wait(240) == 1
    pod = run(
        shown, command, VDIFF_MODEL=model, VDIFF_SERVED_MODEL_NAME="vdiff-tiny", VDIFF_DEVICE="cpu"
    )
    url = f"http://127.0.0.1:{port}"
    eventually(
        lambda: run(shown, started).wait(240) == 0 or pod.poll(), seconds=120, what="its worker"
    )
    assert "worker_ready" in pod.log.read_text(errors="replace"), said(pod)
    eventually(answers(url + shown["readinessProbe"]["httpGet"]["path"]), seconds=30, what="ready")
    job = httpx.post(
        f"{url}/v1/jobs", json=chat_job(), headers={**KEY, "prefer": "wait=30"}, timeout=60
    ).json()
    assert job["result"]["choices"][0]["message"]["content"] == "42", said(pod)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(240) == 0, said(pod)


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
