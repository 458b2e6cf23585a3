"""`vdiff up` for real: everything comes up, comes back when killed, survives a restart, and is gone
at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import ROOT, Jobs, eventually
from tests.integration.supervised import Up, alive, chat_job, curl_line, long_job, open_folder
from vdiff.embedded.process import free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
Start = Callable[..., Up]


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """One for the tests that leave it running."""
    with open_folder() as folder:
        made = Up(folder)
        try:
            yield made.wait_ready()
        finally:
            made.end()


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    started: list[Up] = []

    def make(*options: object, **more: object) -> Up:
        started.append(Up(folder, *options, **more))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for one in started:
        one.end()


def test_it_says_what_it_starts_and_how_to_ask(up: Up) -> None:
    said = up.said
    for line in (
        "starting PostgreSQL in",
        "starting Redis in",
        "migrating the database",
        "starting worker",
        "starting api",
    ):
        assert line in said
    assert f"vdiff is ready   dashboard {up.url}/   API {up.url}/v1   docs {up.url}/docs" in said
    assert str(up.data_dir) in said
    assert httpx.get(f"{up.url}/docs", timeout=120).status_code == 200
    assert httpx.get(f"{up.url}/health/ready", timeout=120).json() == {
        "status": "ready",
        "models": 1,
        "workers": 1,
    }


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_printed_curl_line_answers(up: Up) -> None:
    done = subprocess.run(
        ["bash", "-c", curl_line(up.said)], capture_output=True, text=True, timeout=60, check=True
    )
    job = json.loads(done.stdout)
    assert (job["status"], job["result"]["choices"][0]["message"]["content"]) == ("succeeded", "42")


def test_a_job_is_done(up: Up) -> None:
    job = up.done(chat_job("What is 20 + 22?"))
    assert job["result"]["choices"][0]["message"]["content"] == "42"


def refused(one: Up) -> str:
    """The one line of a start that could not be; nothing of it is left."""
    eventually(
        lambda: one.below() is None or one.process.poll() is not None, seconds=90, what="an end"
    )
    said = one.errors()
    assert one.process.returncode not in (0, None)
    assert len(said.strip().splitlines()) == 1, said
    assert "Traceback" not in one.said
    eventually(lambda: one.left() == [], what="nothing left")
    return said.strip()


def test_a_second_one_in_the_same_folder(up: Up, start: Start) -> None:
    said = refused(start(data_dir=up.data_dir))
    assert (
        said
        == f"vdiff: another `vdiff up` uses {up.data_dir}; stop it, or choose another folder with --data-dir"
    )
    assert up.done(chat_job())["status"] == "succeeded"  # the first does not mind


def test_a_port_in_use(up: Up, start: Start) -> None:
    said = refused(start("--port", up.port))
    assert said == f"vdiff: port {up.port} on 127.0.0.1 is in use; choose another with --port"


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({}, ["--model", "./nowhere"], ["model './nowhere'", "no such folder"]),
        (
            {"database_url": "postgresql://u:secret@127.0.0.1:1/d"},
            [],
            ["cannot migrate the database", "127.0.0.1"],
        ),
        (
            {"database_url": "mysql://h/d"},
            [],
            ["VDIFF_DATABASE_URL", "must start with postgresql://"],
        ),
        ({"redis_url": "redis://127.0.0.1:1/0"}, [], ["cannot reach Redis"]),
        ({}, ["--tensor-parallel-size", "2"], ["tensor_parallel_size"]),
        ({"prot": "1"}, [], ["VDIFF_PROT", "did you mean VDIFF_PORT"]),
    ],
    ids=[
        "model",
        "database-away",
        "database-scheme",
        "redis-away",
        "engine-option",
        "unknown-setting",
    ],
)
def test_what_is_set_wrongly_is_one_line(
    start: Start, settings: dict[str, str], options: list[str], words: list[str]
) -> None:
    said = refused(start(*options, **settings))
    assert said.startswith("vdiff: ")
    for word in words:
        assert word in said
    assert "secret" not in said


def test_a_database_that_does_not_let_us_in(start: Start, postgres_url: str) -> None:
    head, _, tail = postgres_url.rpartition("@")
    said = refused(start(database_url=f"{head.rpartition(':')[0]}:wrong@{tail}"))
    assert "cannot migrate the database" in said
    assert "password authentication failed" in said


@pytest.mark.parametrize("name", ["worker", "api", "redis", "postgres"])
def test_a_part_that_is_killed_comes_back_and_jobs_go_on(up: Up, name: str) -> None:
    running = httpx.post(f"{up.url}/v1/jobs", json=long_job(), timeout=120).json()
    eventually(
        lambda: (
            httpx.get(f"{up.url}/v1/jobs/{running['id']}", timeout=120).json()["status"]
            == "running"
        ),
        what="running",
    )
    victim = up.part(name)
    up.below()
    victim.kill()
    eventually(lambda: not alive(victim), what="its death")
    assert (
        up.done(chat_job("What is 20 + 22?"))["result"]["choices"][0]["message"]["content"] == "42"
    )
    job = up.wait(running["id"], seconds=180)
    assert job["status"] == "succeeded"
    attempts = httpx.get(f"{up.url}/v1/jobs/{job['id']}/attempts", timeout=120).json()["data"]
    assert [a["outcome"] for a in attempts].count("succeeded") == 1
    again = up.part(name)
    assert again.pid != victim.pid
    assert f"{name} was ended by signal 9; it starts again in" in up.said


def test_jobs_survive_a_restart_and_nothing_is_left(start: Start) -> None:
    first = start("--max-num-seqs", "1", drain_seconds=1).wait_ready()
    done = first.done(chat_job())
    running = httpx.post(f"{first.url}/v1/jobs", json=long_job(), timeout=120).json()
    more = [
        httpx.post(f"{first.url}/v1/jobs", json=chat_job(), timeout=120).json()["id"]
        for _ in range(3)
    ]
    eventually(
        lambda: (
            httpx.get(f"{first.url}/v1/jobs/{running['id']}", timeout=120).json()["status"]
            == "running"
        ),
        what="running",
    )
    assert first.stop() == 0
    assert first.left() == []
    assert "stopped" in first.said.splitlines()[-1]
    second = start().wait_ready()
    assert (
        httpx.get(f"{second.url}/v1/jobs/{done['id']}", timeout=120).json()["result"]
        == done["result"]
    )
    for job_id in (running["id"], *more):
        assert second.wait(job_id, seconds=180)["status"] == "succeeded"
    assert second.stop() == 0
    assert second.left() == []


def test_a_full_drain_fits_the_time(start: Start) -> None:
    """Ctrl-C, the default 10 s of drain, jobs that would run on: still gone within 20 s."""
    one = start().wait_ready()
    ids = [
        httpx.post(f"{one.url}/v1/jobs", json=long_job(n=16), timeout=120).json()["id"]
        for _ in range(6)
    ]
    eventually(
        lambda: httpx.get(f"{one.url}/v1/jobs/{ids[0]}", timeout=120).json()["status"] == "running",
        what="running",
    )
    assert one.stop(signal.SIGINT) == 0  # raises when it takes longer
    assert one.left() == []


def test_the_supervisor_is_killed(start: Start) -> None:
    """kill -9: the kernel tells the children, and the same folder works again."""
    if sys.platform != "linux":
        pytest.skip("Linux tells children that their parent died; others do not")
    first = start().wait_ready()
    done = first.done(chat_job())
    first.below()
    first.process.kill()
    first.process.wait(10)
    eventually(lambda: first.left() == [], seconds=30, what="children gone")
    second = start().wait_ready()
    assert second.wait(done["id"])["result"] == done["result"]
    assert second.done(chat_job())["status"] == "succeeded"


def test_flower_and_several_workers(start: Start) -> None:
    port = free_port()
    one = start(
        "--workers", "2", "--served-model-name", "mine", flower=True, flower_port=port
    ).wait_ready()
    assert f"Flower           http://127.0.0.1:{port}" in one.said

    def pages() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/", timeout=120).status_code == 200
        except httpx.TransportError:
            return False

    eventually(pages, seconds=60, what="Flower")
    eventually(
        lambda: httpx.get(f"{one.url}/health", timeout=120).json()["workers"] == 2,
        seconds=60,
        what="two workers",
    )
    job = chat_job()
    job["body"]["model"] = "mine"
    assert one.done(job)["result"]["choices"][0]["message"]["content"] == "42"
    assert '"model":"mine"' in curl_line(one.said)
    assert one.stop() == 0
    assert one.left() == []


def test_services_of_ones_own_replace_the_embedded(start: Start, jobs: Jobs) -> None:
    one = start(database_url=jobs.database_url, redis_url=jobs.redis_url).wait_ready()
    assert one.done(chat_job())["status"] == "succeeded"
    assert not (one.data_dir / "postgres").exists()
    assert not (one.data_dir / "redis").exists()
    assert "starting PostgreSQL" not in one.said
    with jobs.database.read():
        pass
    assert one.stop() == 0
    assert one.left() == []
    assert jobs.redis.ping()  # they are not ours to stop


def _as_nobody() -> list[str] | None:
    """A prefix that runs a command as an ordinary user; the machine may not let us.

    Where the interpreter lies below /root, the right to read there is kept, and nothing else.
    """
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return None
    prefix = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    script = f"import os, sys; os.listdir({str(ROOT)!r}); print(os.geteuid(), sys.version_info[:3])"
    for more in ([], ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]):
        done = subprocess.run(
            [*prefix, *more, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd="/",
            timeout=60,
            check=False,
        )
        if done.stdout.strip() == f"65534 {sys.version_info[:3]}":
            return [*prefix, *more]
    return None


def test_a_cluster_that_cannot_be_reached_any_more_is_no_new_one(
    start: Start, folder: Path
) -> None:
    """PostgreSQL is another user under root. Changed permissions must not look like a loss of all
    jobs.
    """
    if os.geteuid() != 0:
        pytest.skip("only root needs another user for PostgreSQL")
    first = start().wait_ready()
    done = first.done(chat_job())
    assert first.stop() == 0
    folder.chmod(0o700)
    assert "cannot enter it any more" in refused(start())
    folder.chmod(0o755)
    second = start().wait_ready()
    assert second.wait(done["id"])["result"] == done["result"]


def test_as_an_ordinary_user(start: Start, folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("every other test here runs as an ordinary user already")
    prefix = _as_nobody()
    if prefix is None:
        pytest.skip("this machine does not let root run something as nobody")
    home = folder / "home"
    home.mkdir()
    shutil.chown(home, 65534, 65534)
    one = start(
        command=[*prefix, sys.executable, "-m", "vdiff"], data_dir=home / "data"
    ).wait_ready()
    assert {p.uids().real for p in one.below()} == {65534}
    assert one.done(chat_job())["status"] == "succeeded"
    assert one.stop() == 0
    assert one.left() == []
