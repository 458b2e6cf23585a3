"""The gate in front of a worker's slots: side by side, or apart."""

from __future__ import annotations

import threading

from worker.gate import Gate


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
