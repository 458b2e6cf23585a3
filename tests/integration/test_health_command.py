"""`vdiff health`, what containers ask: whether a worker of this machine is alive."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT, Jobs, Served, eventually

pytestmark = pytest.mark.integration


def health(database_url: str, *part: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    return subprocess.run(
        [sys.executable, "-m", "vdiff", "health", *part],
        env={**env, "VDIFF_DATABASE_URL": database_url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_alive(served: Served) -> None:
    done = health(served.jobs.database_url)
    row = served.worker.row()
    assert done.returncode == 0 and row is not None and row.id in done.stdout
    eventually(
        lambda: health("postgresql://127.0.0.1:1/x", "worker", "--local").returncode == 0,
        what="its loop turns",
    )


def test_no_worker(jobs: Jobs) -> None:
    done = health(jobs.database_url)
    assert done.returncode == 1 and "no live worker" in done.stdout
    done = health(jobs.database_url, "deliver")
    assert done.returncode == 1 and "no live sender of webhooks" in done.stdout


def test_no_database() -> None:
    done = health("postgresql://nobody:secret-word@127.0.0.1:1/nothing")
    assert done.returncode == 1 and "PostgreSQL" in done.stderr
    assert "secret-word" not in done.stdout + done.stderr
