"""The parts of `vdiff up` and of the command line that need no server: checks, backoff, options,
lazy imports.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shared.errors import ConfigurationError
from shared.settings import load_settings
from vdiff import bundled, cli, up
from vdiff.embedded.postgres import EmbeddedPostgres
from vdiff.embedded.process import free_port, stop_process, wait_until
from vdiff.embedded.redis import EmbeddedRedis, _binary
from vdiff.up import Child, Supervisor, port_is_free

ROOT = Path(__file__).parents[3]


Make = Callable[..., Supervisor]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Make]:
    made: list[Supervisor] = []

    def make(**settings: Any) -> Supervisor:
        given = {"data_dir": tmp_path, "port": free_port(), **settings}
        made.append(Supervisor(load_settings({}, **given), flower=False))
        return made[-1]

    yield make
    for one in made:
        one._stop_all()


def refused(made: Supervisor) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as wrong:
        made._check()
    assert "\n" not in wrong.value.message
    return wrong.value


def test_a_port_in_use(supervisor: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        error = refused(supervisor(port=port))
        assert (error.param, error.message) == (
            "port",
            f"port {port} on 127.0.0.1 is in use; choose another with --port",
        )
    assert port_is_free("127.0.0.1", port)


def test_port_0_is_a_free_one(supervisor: Make) -> None:
    made = supervisor(port=0)
    made._check()
    assert made._url == f"http://127.0.0.1:{made._port}"
    assert made._port > 0


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://127.0.0.1:8"),
        ("::1", "http://[::1]:8"),
        ("h", "http://h:8"),
    ],
)
def test_urls_that_a_person_can_open(supervisor: Make, host: str, url: str) -> None:
    assert supervisor(host=host, port=8)._url == url


@pytest.mark.parametrize("model", ["./none", "/none/at/all", "~/none", "none", "a/b/c"])
def test_a_missing_model(supervisor: Make, model: str) -> None:
    error = refused(supervisor(model=model))
    assert (error.param, error.message) == ("model", f"model {model!r}: no such folder")


def test_a_folder_that_is_no_model(supervisor: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(supervisor(model=str(tmp_path / "empty"))).message


def test_a_hub_id_is_for_the_worker_to_judge(supervisor: Make) -> None:
    supervisor(model="GSAI-ML/LLaDA-8B-Instruct")._check()


def test_one_folder_serves_one(supervisor: Make, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(supervisor()).param == "data_dir"
    supervisor()._check()


def test_a_folder_that_cannot_be(supervisor: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(supervisor(data_dir=tmp_path / "file" / "x")).param == "data_dir"


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(up.time, "monotonic", lambda: self.now)


def test_a_child_that_keeps_dying_waits_longer_each_time(
    supervisor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    made = supervisor()
    said: list[str] = []
    monkeypatch.setattr(made, "_say", said.append)
    starts: list[float] = []

    def start() -> subprocess.Popen[bytes]:
        starts.append(clock.now)
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
        process.wait()
        return process

    child = Child("worker", start)
    made._launch(child)
    for _ in range(200):
        made._tend(child, starting=False)
        clock.now += 0.5
    gaps = [b - a for a, b in pairwise(starts)]
    assert [round(g) for g in gaps[:6]] == sorted(round(g) for g in gaps[:6])
    assert [1 <= g <= 3 for g in gaps[:1]] == [True]
    assert max(gaps) <= up.BACKOFF_SECONDS_MAX + 2
    assert said[0] == "worker ended with 3; it starts again in 1 s"
    clock.now += up.STEADY_SECONDS + 60
    made._tend(child, starting=False)  # launches
    clock.now += up.STEADY_SECONDS + 1
    made._tend(child, starting=False)  # lived long: the count begins anew
    assert child.deaths == 1


def test_a_wrong_setting_while_things_come_up_ends_all(supervisor: Make) -> None:
    made = supervisor()
    command = [sys.executable, "-c", "raise SystemExit(2)"]
    child = Child(
        "worker", lambda: subprocess.Popen(command), last_lines=["vdiff worker: no such thing"]
    )
    made._launch(child)
    assert child.process is not None
    child.process.wait(20)
    with pytest.raises(ConfigurationError, match=r"^no such thing$"):
        made._tend(child, starting=True)
    flower = Child("flower", lambda: subprocess.Popen(command), essential=False)
    made._launch(flower)
    assert flower.process is not None
    flower.process.wait(20)
    made._tend(flower, starting=True)
    assert flower.retry_at is not None


def test_stopping_escalates() -> None:
    stubborn = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    stop_process(process, 15, 0.1)
    assert process.returncode == -9
    stop_process(process, 15, 0.1)  # gone already


def test_a_server_that_does_not_come_up_shows_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nwhy it ended\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    process.wait(20)
    with pytest.raises(ConfigurationError, match="Thing ended with code 7: why it ended"):
        wait_until(lambda: False, process, "Thing", log, 20)


def test_redis_server_bin_must_be_a_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REDIS_SERVER_BIN", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="REDIS_SERVER_BIN"):
        _binary()
    monkeypatch.setenv("REDIS_SERVER_BIN", sys.executable)
    assert _binary() == sys.executable
    monkeypatch.delenv("REDIS_SERVER_BIN")
    assert os.access(_binary(), os.X_OK)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("port", [0, 8000])
def test_a_host_that_is_not_here(supervisor: Make, port: int) -> None:
    """An address of another machine is no port in use; nor is it a traceback."""
    error = refused(supervisor(host="192.0.2.1", port=port))
    assert (
        error.param == "host"
        and "cannot listen on 192.0.2.1" in error.message
        and "--host" in error.message
    )


def test_a_pid_file_is_removed_only_where_another_program_has_its_number(tmp_path: Path) -> None:
    pid = tmp_path / "postmaster.pid"
    EmbeddedPostgres._clear_stale_pid(tmp_path)
    pid.write_text(f"{os.getpid()}\n")
    EmbeddedPostgres._clear_stale_pid(tmp_path)
    assert not pid.exists()
    pid.write_text(
        f"{2**22 + 5}\n"
    )  # nobody: PostgreSQL itself tells, and by the file whether its backends are gone
    EmbeddedPostgres._clear_stale_pid(tmp_path)
    assert pid.exists()


def test_free_ports() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass
    assert EmbeddedRedis(Path("x"), port=5).port == 5


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "fastapi",
        "celery",
        "sqlalchemy",
        "httpx",
        "numpy",
    )  # a probe runs `vdiff health` every few seconds
    code = f"import sys, vdiff, vdiff.cli; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_names_of_the_front_door() -> None:
    import vdiff

    assert vdiff.VLLM_COMPAT_VERSION == "0.4.0"
    assert ".".join(map(str, vdiff.__version_info__[:3])) == vdiff.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vdiff.no_such_name


def test_the_bundled_models_are_there() -> None:
    for name in (bundled.DEFAULT_MODEL, "vdiff-tiny-ar"):
        folder = bundled.folder(name)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            p.name for p in folder.iterdir()
        }
        assert sum(p.stat().st_size for p in folder.iterdir()) < 12_000_000


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    for name in ("up", "api", "worker", "migrate", "flower", "generate", "version"):
        assert name in shown


def test_a_wait_is_bounded(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match="is not ready after 0 s: no output"):
        wait_until(lambda: False, process, "Thing", tmp_path / "none", 0.1)
    assert process.poll() is not None
    assert time.monotonic() >= began


ENGINE_OPTIONS = [
    "--model",
    "--tokenizer",
    "--revision",
    "--dtype",
    "--device",
    "--max-model-len",
    "--max-num-seqs",
    "--max-batch",
    "--trust-remote-code",
    "--tensor-parallel-size",
    "--gpu-memory-utilization",
    "--quantization",
    "--diffusion-steps",
    "--block-size",
    "--enable-apd",
    "--disable-apd",
    "--verifier",
]


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (
            "up",
            ["--host", "--port", "--served-model-name", "--data-dir", "--workers", "--no-flower"],
        ),
        ("worker", ["--served-model-name"]),
        ("generate", ["--input", "--output"]),
    ],
)
def test_the_options_that_users_of_vllm_know(command: str, more: list[str]) -> None:
    known = {
        name
        for p in typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
        for name in (*p.opts, *p.secondary_opts)
    }
    assert {*ENGINE_OPTIONS, *more} <= known


def test_children_see_what_was_given(supervisor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = supervisor(block_size=4, enable_apd=False, dtype="float32")
    given = made._settings.environment()
    assert given["VDIFF_BLOCK_SIZE"] == "4"
    again = load_settings(given)
    assert again == made._settings
    assert "VDIFF_MODEL" not in given


def test_help_shows_the_defaults() -> None:
    assert "[default: auto]" in " ".join(
        CliRunner().invoke(cli.app, ["worker", "--help"]).output.split()
    )
