"""The gate in front of a worker's slots: side by side, or apart."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from worker.gate import Gate
from worker.held import HeldAttempts
from worker.isolation import Isolation
from worker.runner import Counters, Runner


def test_a_closed_gate_lets_nobody_in_but_those_that_run_apart() -> None:
    gate = Gate()
    assert gate.enter(0) and not gate.is_empty
    gate.close()
    assert not gate.wait_empty(0)
    assert not gate.enter(0)
    gate.leave()
    assert gate.wait_empty(0)
    gate.enter_apart()
    assert not gate.is_empty and not gate.enter(0)
    gate.leave()
    gate.open()
    assert gate.is_open and gate.enter(0)


def test_what_waits_comes_in_when_the_gate_opens() -> None:
    gate = Gate()
    gate.close()
    came: list[bool] = []
    thread = threading.Thread(target=lambda: came.append(gate.enter(30)))
    thread.start()
    while not gate.waiting:
        threading.Event().wait(0.01)
    gate.open()
    thread.join(30)
    assert came == [True] and gate.waiting == 0 and not gate.is_empty


def test_a_job_at_the_gate_of_a_worker_that_shuts_down_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([True, False])
    runner = Runner(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        HeldAttempts(),
        lambda event: None,
        worker_id="w",
        lease_seconds=1,
        counters=Counters(),
        accepts=lambda: next(answers),
    )
    put_back: list[str] = []
    monkeypatch.setattr(runner, "put_back", put_back.append)
    runner.run_job("job_1")  # a claim would need a database
    assert put_back == ["job_1"] and runner.gate.is_empty


def test_suspects_whose_threads_do_not_start_are_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    ran: list[str] = []
    given_back: list[str] = []
    release = threading.Event()

    class PlantedRunner:
        def run_claimed(self, job: Any, *, began: float) -> None:
            release.wait(30)
            ran.append(job.id)

        def give_back(self, jobs: Any) -> None:
            given_back.extend(job.id for job in jobs)

    isolation = Isolation(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        PlantedRunner(),  # type: ignore[arg-type]
        gate,
        model="m",
        worker_id="w",
        slots=4,
        revision=None,
        accepts=lambda: True,
    )
    start, starts = threading.Thread.start, iter([True, False])

    def start_once(thread: threading.Thread) -> None:
        if not next(starts):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_once)
    jobs: Any = [SimpleNamespace(id=name) for name in ("first", "second", "third")]
    threads = isolation._start_all(jobs, 0.0)
    release.set()
    threads[0].join(30)
    assert (len(threads), ran, given_back) == (1, ["first"], ["second", "third"])
    assert gate.is_empty
