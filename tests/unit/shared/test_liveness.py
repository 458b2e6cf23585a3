"""The sign of life of a process without a port."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared import liveness
from vdiff.cli import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def health(part: str) -> tuple[int, str]:
    done = CliRunner().invoke(
        app, ["health", part, "--local"], env={"VDIFF_DATABASE_URL": "postgresql://127.0.0.1:1/x"}
    )
    return done.exit_code, done.output.strip()


@pytest.mark.parametrize("part", ["worker", "deliver"])
def test_a_loop_that_turns_is_alive_whatever_postgresql_does(part: str) -> None:
    assert health(part) == (1, f"{part}: never turned here")
    liveness.turn(part)
    assert health(part) == (0, f"{part}: turned 0 s ago")
    long_ago = time.time() - liveness.STALE_SECONDS - 10
    os.utime(liveness.alive_file(part), (long_ago, long_ago))
    assert health(part)[0] == 1
    liveness.turn(part)
    assert health(part)[0] == 0


def test_nothing_is_written_through_a_link(folder: Path) -> None:
    target = folder / "precious"
    target.write_text("x")
    os.utime(target, (1, 1))
    liveness.alive_file("worker").symlink_to(target)
    liveness.turn("worker")
    assert target.stat().st_mtime == 1


def test_a_folder_that_cannot_be_written_stops_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    liveness.turn("worker")
    assert liveness.seconds_since_turn("worker") is None
