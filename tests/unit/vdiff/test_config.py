"""`vdiff config` as a person runs it: what is in force, masked, and what does not hold together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


def vdiff(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env.update({f"VDIFF_{k.upper()}": v for k, v in settings.items()})
    return subprocess.run(
        [sys.executable, "-m", "vdiff", *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_show_has_every_setting_and_no_secret() -> None:
    given = {
        "port": "9001",
        "api_key": "hidden-1",
        "flower_basic_auth": "me:hidden-2",
        "database_url": "postgresql://u:hidden-3@db/x",
    }
    done = vdiff("config", "show", "--json", **given)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == set(Settings.model_fields)
    assert rows["port"] == {"value": 9001, "from": "environment"}
    assert rows["lease_seconds"] == {"value": 30.0, "from": "default"}
    text = vdiff("config", "show", **given).stdout
    assert "* VDIFF_PORT" in text and "  VDIFF_LEASE_SECONDS" in text
    assert "hidden" not in done.stdout + text


def test_check_is_content_with_the_defaults() -> None:
    done = vdiff("config", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("good")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prot": "1"}, "did you mean VDIFF_PORT?"),
        ({"port": "x"}, "VDIFF_PORT"),
        ({"flower_basic_auth": "nopassword"}, "must be name:password"),
        ({"model": "/no/such/folder"}, "VDIFF_MODEL"),
        ({"redis_url": "redis://h/0"}, "VDIFF_DATABASE_URL"),
        ({"auth": "open", "host": "0.0.0.0"}, "VDIFF_AUTH=open"),
        ({"worker_stale_seconds": "12"}, "VDIFF_WORKER_STALE_SECONDS"),
        ({"hang_seconds": "5"}, "VDIFF_HANG_SECONDS"),
    ],
)
def test_check_names_what_is_wrong(settings: dict[str, str], said: str) -> None:
    done = vdiff("config", "check", **settings)
    assert done.returncode == 2
    assert said in done.stderr


def test_check_for_programs() -> None:
    done = vdiff("config", "check", "--json", port="9001")
    assert (done.returncode, json.loads(done.stdout)) == (
        0,
        {"good": True, "troubles": [], "given": 1},
    )
    done = vdiff("config", "check", "--json", hang_seconds="5")
    said = json.loads(done.stdout)
    assert (done.returncode, said["good"], said["troubles"][0].split()[0]) == (
        2,
        False,
        "VDIFF_HANG_SECONDS",
    )


def test_flower_beyond_loopback_wants_a_password() -> None:
    done = vdiff("flower", "--host", "0.0.0.0", redis_url="redis://127.0.0.1:1/0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "VDIFF_FLOWER_BASIC_AUTH" in done.stderr
