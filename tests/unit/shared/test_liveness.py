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


NOWHERE = {
    "VDIFF_DATABASE_URL": "postgresql://127.0.0.1:1/x",
    "VDIFF_REDIS_URL": "redis://127.0.0.1:1/0",
}


def health(part: str, **env: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["health", part, "--local"], env={**NOWHERE, **env})
    return done.exit_code, done.output.strip()


@pytest.mark.parametrize("part", ["worker", "deliver"])
def test_a_loop_that_turns_is_alive_whatever_postgresql_does(part: str) -> None:
    assert health(part) == (1, f"{part}: never turned here")
    liveness.turn(part)
    code, said = health(part)
    assert code == 0 and said.startswith(f"{part}: turned ") and said.endswith(" s ago")
    long_ago = time.time() - liveness.STALE_SECONDS - 10
    os.utime(liveness.alive_file(part), (long_ago, long_ago))
    assert health(part)[0] == 1
    liveness.turn(part)
    assert health(part)[0] == 0


def test_turns_that_are_meant_to_be_rare_may_be_old() -> None:
    liveness.turn("worker")
    long_ago = time.time() - liveness.STALE_SECONDS - 10
    os.utime(liveness.alive_file("worker"), (long_ago, long_ago))
    rare = {"VDIFF_HEARTBEAT_SECONDS": "100", "VDIFF_LEASE_SECONDS": "300"}
    assert (health("worker")[0], health("worker", **rare)[0]) == (1, 0)


@pytest.mark.parametrize("part", ["worker", "deliver"])
def test_what_an_earlier_process_left_is_no_sign_of_this_one(part: str) -> None:
    """A container that starts again has the pod's volumes of before, and may load for longer than a
    turn is good.
    """
    liveness.turn(part)
    assert health(part)[0] == 0
    started = CliRunner().invoke(app, [part], env=NOWHERE)  # gets as far as its database
    assert started.exit_code != 0
    assert health(part) == (1, f"{part}: never turned here")


def test_nothing_is_written_through_a_link(folder: Path) -> None:
    target = folder / "precious"
    target.write_text("x")
    os.utime(target, (1, 1))
    liveness.alive_file("worker").symlink_to(target)
    liveness.turn("worker")
    assert target.stat().st_mtime == 1
    liveness.begin("worker")
    assert target.read_text() == "x" and not liveness.alive_file("worker").is_symlink()


def test_a_folder_that_cannot_be_written_stops_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    liveness.begin("worker")
    liveness.turn("worker")
    assert liveness.seconds_since_turn("worker") is None
