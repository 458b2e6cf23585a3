"""Conclusions of the doctor: when a line is ok, a note or bad, and the advice of a bad one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace as Row
from typing import Any

import pytest

from shared.settings import load_settings
from vdiff import doctor
from vdiff.doctor import Check
from vdiff.version import __version__

NOW = 1_800_000_000.0


def states(checks: Iterable[Check]) -> list[tuple[str, str]]:
    found = list(checks)
    assert all(check.advice for check in found if check.state == "bad")
    return [(check.name, check.state) for check in found]


def worker(**more: Any) -> Row:
    usual = {
        "id": "worker_1",
        "model": "m",
        "device": "cpu",
        "slots": 8,
        "version": __version__,
        "state": "ready",
        "live": True,
        "pid": 7,
        "hostname": "h",
        "last_beat_at": datetime.fromtimestamp(NOW - 90, UTC),
    }
    return Row(**usual | more)


def failure(**more: Any) -> Row:
    return Row(
        **{
            "model": "m",
            "hostname": "h",
            "count": 3,
            "message": "model.safetensors is missing",
            "last_at": datetime.fromtimestamp(NOW - 60, UTC),
            **more,
        }
    )


def test_workers() -> None:
    well = list(doctor.workers([worker(), worker(device="cuda:0")], [], [], NOW))
    assert (
        states(well) == [("workers", "ok")]
        and well[0].text == "m: 2 workers, 16 slots, cpu, cuda:0"
    )
    assert states(doctor.workers([], [], [], NOW)) == [("workers", "bad")]
    silent = worker(id="worker_2", live=False)
    assert states(doctor.workers([worker()], [silent], [], NOW)) == [
        ("workers", "ok"),
        ("workers", "note"),
    ]
    assert [c.state for c in doctor.workers([], [silent], [], NOW)] == ["bad", "bad"]
    assert [
        c.state for c in doctor.workers([worker()], [worker(live=False, state="stopped")], [], NOW)
    ] == ["ok"]
    assert [c.state for c in doctor.workers([worker(version="0.0.9")], [], [], NOW)] == [
        "ok",
        "note",
    ]


def test_a_model_that_did_not_load_says_why() -> None:
    (_, why) = doctor.workers([worker(model="other")], [], [failure()], NOW)
    assert why.state == "bad"
    assert why.text == "m did not load on h (1m00s ago, 3 times): model.safetensors is missing"


def lane(jobs: int, priority: str = "normal", **more: Any) -> Row:
    return Row(**{"model": "m", "priority": priority, "tenant": "t", "jobs": jobs, **more})


def test_queues() -> None:
    def age(seconds: float, priority: str = "normal") -> Row:
        return Row(model="m", priority=priority, tenant="t", seconds=seconds)

    assert states(doctor.queues([], [], set())) == [("queue", "ok")]
    assert states(doctor.queues([lane(2)], [age(600)], {"m"})) == [("queue", "ok")]
    assert states(doctor.queues([lane(2)], [age(4000)], {"m"})) == [("queue", "note")]
    assert states(doctor.queues([lane(2, "interactive")], [age(90, "interactive")], {"m"})) == [
        ("queue", "note")
    ]
    (bad,) = doctor.queues([lane(1), lane(4, tenant="u")], [age(5)], {"other"})
    assert (
        bad.state == "bad"
        and bad.text == "m, normal: 5 jobs, the oldest for 5s; no worker serves m"
    )


def test_webhooks() -> None:
    def backlog(due: int, overdue: float | None, failing: int) -> Row:
        return Row(due=due, overdue_seconds=overdue, failing=failing)

    gone = Row(
        id="we_1", url="https://user-data.example.com/hook?token=secret", disabled_reason="gone"
    )
    assert states(doctor.webhooks(backlog(0, None, 0), [], [])) == [("webhooks", "ok")]
    assert states(doctor.webhooks(backlog(9, 5, 2), [], [])) == [("webhooks", "ok")]
    no = Row(
        endpoint_id="we_2",
        url="https://b.example.com/secret",
        waiting=3,
        status_code=500,
        error=None,
    )
    away = Row(
        endpoint_id=None,
        url="https://c.example.com/secret",
        waiting=1,
        status_code=None,
        error="refused",
    )
    checks = list(doctor.webhooks(backlog(9, 500, 2), [no, away], [gone]))
    assert states(checks) == [("webhooks", "bad"), *[("webhooks", "note")] * 3]
    assert "vdiff deliver" in str(checks[0].advice) and "secret" not in "".join(
        check.text for check in checks
    )
    assert (
        checks[1].text
        == "endpoint we_2 (b.example.com) fails: 3 wait to be tried again (last: 500)"
    )
    assert "/v1/webhook_endpoints/we_2/deliveries?status=pending" in str(checks[1].advice)
    assert (
        checks[2].text
        == "a URL of single jobs (c.example.com) fails: 1 wait to be tried again (last: refused)"
    )


def test_clocks_migrations_and_redis() -> None:
    assert doctor.clock("clock", 1.5, 0.1, "Redis").state == "ok"
    assert doctor.clock("clock", 9.0, 8.0, "Redis").state == "ok"  # a slow answer proves nothing
    assert doctor.clock("clock", -75, 0.1, "Redis").text == "this machine is 1m15s ahead of Redis"
    assert doctor.clock("clock", 75, 0.1, "Redis").text == "this machine is 1m15s behind Redis"
    assert doctor.migrated("0007", "0007").state == "ok"
    assert (
        doctor.migrated(None, "0007").advice
        == doctor.migrated("0003", "0007").advice
        == "run `vdiff migrate`"
    )
    assert "newer" in str(doctor.migrated("0009", "0007").advice)
    assert doctor.redis_state({"redis_version": "8.2", "used_memory": 5 << 20}, 0.001).text == (
        "Redis 8.2, 5.0 MiB, answers in 1 ms"
    )
    assert doctor.redis_state({"aof_last_write_status": "err"}, 0.001).state == "bad"
    assert (
        doctor.redis_state({"maxmemory": 1, "maxmemory_policy": "allkeys-lru"}, 0.001).state
        == "note"
    )


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({}, data_dir=tmp_path, file_store=f"file://{tmp_path}/none")
    monkeypatch.setattr(
        "vdiff.doctor.shutil.disk_usage", lambda _: Row(total=100 << 30, free=90 << 30)
    )
    assert states(doctor.disks(settings)) == [("disk", "ok")]
    monkeypatch.setattr(
        "vdiff.doctor.shutil.disk_usage", lambda _: Row(total=100 << 30, free=1 << 30)
    )
    assert states(doctor.disks(settings)) == [("disk", "bad")]
