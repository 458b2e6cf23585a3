"""Background loops: a duty that raises ends nothing, and the end of a thread is heard of."""

from __future__ import annotations

import asyncio
import threading

import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter
from redis.exceptions import ReadOnlyError

from shared.background import BackgroundThread, BackgroundThreads, Duty, watch_task


def failures() -> Counter:
    return Counter("t_failures", "of duties", ["duty"], registry=CollectorRegistry())


def test_one_duty_that_raises_keeps_no_other_from_its_turn() -> None:
    counted, turns, enough = failures(), [], threading.Event()

    def broken() -> None:
        raise AttributeError("planted")

    def sound() -> None:
        turns.append(1)
        if len(turns) == 5:
            enough.set()

    thread = BackgroundThread(
        "t",
        [
            Duty("broken", broken, every=0.0, failures=counted, backoff_max=0.0),
            Duty("sound", sound, every=0.001, failures=counted),
        ],
    )
    gone: list[str] = []
    thread.on_gone = gone.append
    with structlog.testing.capture_logs() as logs:
        thread.start()
        assert enough.wait(20)
        thread.close()
    assert not thread.is_alive() and gone == []
    assert (
        counted.labels(duty="broken")._value.get() >= 5
        and counted.labels(duty="sound")._value.get() == 0
    )
    assert [line["event"] for line in logs] == ["duty_failed_unexpectedly"], "once per streak"


def test_a_streak_backs_off_and_its_end_is_said() -> None:
    answers: list[Exception | None] = [
        ReadOnlyError("READONLY"),
        ReadOnlyError("READONLY"),
        ReadOnlyError("x"),
        None,
    ]

    def run() -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    duty = Duty("d", run, every=0.25, backoff_max=2.0)
    with structlog.testing.capture_logs() as logs:
        pauses = [duty.failed(ReadOnlyError("READONLY")) for _ in range(5)]
        duty.succeeded()
        for _ in range(4):
            duty.perform()
    assert pauses == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert [line["event"] for line in logs] == ["duty_failed", "duty_recovered"] * 2
    assert logs[1]["failures"] == 5 and logs[3]["failures"] == 3
    assert duty.streak == 0 and not duty.is_due()


def test_a_duty_says_when_it_is_due_again() -> None:
    duty = Duty("d", lambda: 0.0, every=3600)
    duty.perform()
    assert duty.is_due()
    other = Duty("d", lambda: None, every=3600)
    assert other.is_due()
    other.perform()
    assert not other.is_due()


@pytest.mark.parametrize(
    "planted", [SystemExit(3), KeyboardInterrupt()], ids=lambda exc: type(exc).__name__
)
def test_the_end_of_a_thread_is_heard_of(planted: BaseException) -> None:
    heard, came = [], threading.Event()

    def run() -> None:
        raise planted

    def on_gone(reason: str) -> None:
        heard.append(reason)
        came.set()

    threads = BackgroundThreads(on_gone)
    threads.add(BackgroundThread("t-broken", [Duty("d", run, every=0.0)]))
    threads.add(BackgroundThread("t-sound", [Duty("d", lambda: None, every=0.01)]))
    threads.start()
    assert came.wait(20)
    assert heard == [f"thread t-broken ended: {type(planted).__name__}: {planted}"]
    assert "t-broken" in threads.silent(3600) and "t-sound" not in threads.silent(3600)
    threads.close()
    assert threads.silent(3600) == [], "threads that were closed are not missed"


def test_a_thread_that_hangs_is_silent_and_one_with_rare_duties_is_not() -> None:
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(20)

    threads = BackgroundThreads(lambda reason: None)
    hung = BackgroundThread("t-hung", [Duty("d", hang, every=0.0)])
    rare = BackgroundThread("t-rare", [Duty("d", lambda: None, every=3600)])
    threads.add(hung, rare)
    hung.turned_at -= 121  # a model that takes minutes to load
    assert threads.silent(120) == []
    threads.start()
    assert entered.wait(20)
    hung.turned_at -= 121
    assert threads.silent(120) == ["t-hung"]
    release.set()
    threads.close()


def test_the_end_of_a_task_is_heard_of_and_its_cancellation_is_not() -> None:
    async def run() -> list[str]:
        heard: list[str] = []

        async def broken() -> None:
            raise TypeError("planted")

        async def endless() -> None:
            await asyncio.Event().wait()

        tasks = [
            asyncio.create_task(broken(), name="t-broken"),
            asyncio.create_task(endless(), name="t-endless"),
        ]
        for task in tasks:
            watch_task(task, heard.append)
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return heard

    assert asyncio.run(run()) == ["task t-broken ended: TypeError: planted"]
