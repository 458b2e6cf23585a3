"""State in a worker's memory: events on their way, attempts and why they stop, and whether its
engine hangs.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.events import Event
from shared.jobs.steps import StepLog, unpacked
from shared.sampling_params import SamplingParams
from shared.strict_json import NotStorable, require_storable, storable
from worker import relay
from worker.engine.outputs import StepEvent
from worker.engine.state import EngineState, HealthStatus
from worker.heartbeat import HangDetector
from worker.held import HeldAttempts, StopReason
from worker.relay import merge
from worker.runner import Counters, Runner


def progress(text: str, offset: int, *, job: str = "a", index: int = 0, attempt: int = 1) -> Event:
    return Event(
        job,
        "progress",
        {"attempt": attempt, "index": index, "step": offset, "offset": offset, "text": text},
    )


def test_merging_keeps_the_text_and_drops_the_denoising() -> None:
    events = [
        Event("a", "started", {"attempt": 1}),
        progress("ab", 0),
        Event("a", "denoise", {"attempt": 1, "index": 0}),
        progress("x", 0, index=1),
        progress("c", 2),
        progress("B", 0, job="b"),
        Event("a", "done", {"status": "succeeded"}),
    ]
    merged = merge(events)
    assert [(e.job_id, e.type) for e in merged] == [
        ("a", "started"),
        ("a", "progress"),
        ("a", "progress"),
        ("b", "progress"),
        ("a", "done"),
    ]
    whole = next(e for e in merged if e.job_id == "a" and e.data.get("index") == 0)
    assert (whole.data["text"], whole.data["offset"], whole.data["step"]) == ("abc", 0, 2)


def test_attempts_are_not_mixed() -> None:
    merged = merge([progress("ab", 0), progress("a", 0, attempt=2)])
    assert [(e.data["attempt"], e.data["text"]) for e in merged] == [(1, "ab"), (2, "a")]


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.text(max_size=3)), max_size=30),
    st.integers(1, 4),
)
def test_merging_in_any_portions_loses_no_text(
    pieces: list[tuple[str, int, str]], portion: int
) -> None:
    said: dict[tuple[str, int], str] = {}
    pending: list[Event] = []
    for n, (job, index, text) in enumerate(pieces):
        before = said.get((job, index), "")
        pending.append(progress(text, len(before), job=job, index=index))
        said[job, index] = before + text
        if n % portion == 0:
            pending = merge(pending)
    merged = merge(pending)
    assert {(e.job_id, e.data["index"]): e.data["text"] for e in merged} == said
    assert all(e.data["offset"] == 0 for e in merged)
    assert merge(merged) == merged


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "JOBS_PENDING_MAX", 3)
    merged = merge([progress("x", 0, job=str(i)) for i in range(10)])
    assert [e.job_id for e in merged] == ["7", "8", "9"]


class Handle:
    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


def test_the_first_reason_counts() -> None:
    held = HeldAttempts().add("a", 1)
    handle = Handle()
    held.attach(handle)
    assert held.stop(StopReason.CANCELLED)
    assert not held.stop(StopReason.LOST)
    assert (held.reason, handle.aborted) == (StopReason.CANCELLED, 1)


def test_a_stop_before_the_engine_has_it_takes_effect_then() -> None:
    held = HeldAttempts().add("a", 1)
    assert held.stop(StopReason.DRAINED)
    handle = Handle()
    held.attach(handle)
    assert handle.aborted == 1


def test_of_many_stops_one_wins() -> None:
    held = HeldAttempts().add("a", 1)
    handle = Handle()
    held.attach(handle)
    barrier = threading.Barrier(8)
    won: list[bool] = []

    def race(reason: StopReason) -> None:
        barrier.wait()
        won.append(held.stop(reason))

    reasons = [*StopReason, *StopReason, *StopReason][:8]
    threads = [threading.Thread(target=race, args=(r,)) for r in reasons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (won.count(True), handle.aborted) == (1, 1)


def test_held_attempts() -> None:
    held = HeldAttempts()
    first = held.add("a", 1)
    assert (len(held), held.get("a"), held.get("b"), first.pair) == (1, first, None, ("a", 1))
    handle = Handle()
    first.attach(handle)
    second = held.add("a", 2)  # swept and claimed again before a heartbeat could tell the first
    assert (first.reason, handle.aborted, second.reason) == (StopReason.LOST, 1, None)
    held.remove(first)
    assert held.all() == [second]
    assert not held.wait_until_empty(0)
    threading.Timer(0.05, held.remove, [second]).start()
    assert held.wait_until_empty(20)
    assert len(held) == 0


class Engine:
    """The counters that the detector reads, moved by hand."""

    def __init__(self) -> None:
        self.has_work = False
        self.steps_total = 0
        self.healthy = True

    def get_health(self) -> HealthStatus:
        state = EngineState.READY if self.healthy else EngineState.ERROR
        return HealthStatus(**_health(state, self.healthy))


def _health(state: EngineState, healthy: bool) -> dict[str, Any]:
    known = {"state": state, "healthy": healthy, "model": "m", "error": None, "detail": None}
    return {name: known.get(name) for name in HealthStatus.__dataclass_fields__}


def test_an_engine_hangs_only_when_it_has_work_and_stands_still() -> None:
    engine, clock = Engine(), [0.0]
    detector = HangDetector(engine, 10, now=lambda: clock[0])

    def after(seconds: float) -> bool:
        clock[0] += seconds
        return detector.is_hung()

    assert not after(1000)  # idle
    engine.has_work = True
    assert not after(10)
    engine.steps_total += 1
    assert not after(10)  # it moved
    assert not after(9)
    assert after(2)  # 11 s without a step
    engine.steps_total += 1
    assert not after(0)
    engine.has_work = False
    assert not after(1000)
    engine.has_work = True
    assert not after(10)  # the idle time does not count


def test_a_dead_engine_is_hung_at_once() -> None:
    engine = Engine()
    detector = HangDetector(engine, 10, now=lambda: 0.0)
    engine.healthy = False
    assert detector.is_hung()


def test_counters_add_up_over_threads() -> None:
    counters = Counters()
    threads = [
        threading.Thread(
            target=lambda: [counters.add(jobs_succeeded=1, job_ms=2) for _ in range(500)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counters.snapshot()["jobs_succeeded"], counters.snapshot()["job_ms"]) == (2000, 4000)
    with pytest.raises(KeyError):
        counters.add(no_such_counter=1)


def test_what_jsonb_cannot_hold_is_replaced() -> None:
    value = {"a": ["x\x00y", {"b": "z\ud800"}], "n": 1, "t": None}
    assert storable(value) == {"a": ["x\ufffdy", {"b": "z?"}], "n": 1, "t": None}
    # Keys are model text too (`top_logprobs` of completions); those that differed stay apart.
    tops = {"x\x00": -1.0, "x\ufffd": -2.0, "\ud800": -3.0}
    assert storable({"top": ({"t": tops},)}) == {
        "top": [{"t": {"x\ufffd": -1.0, "x\ufffd\ufffd": -2.0, "?": -3.0}}]
    }


def test_what_is_no_json_or_too_large_is_told_apart() -> None:
    require_storable({"a": [1, "é"]}, most_bytes=16)
    for value, reason in (
        ({"a": [1, "éé"]}, "16 bytes|18 bytes"),
        ({"a": math.nan}, "not JSON"),
        ({"a": {1}}, "not JSON"),
    ):
        with pytest.raises(NotStorable, match=reason):
            require_storable(value, most_bytes=16)


def test_texts_of_single_tokens_are_cleaned_in_events_and_kept_steps() -> None:
    emitted: list[Event] = []
    held = HeldAttempts().add("a", 1)
    runner = Runner(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        emitted.append,
        worker_id="w",
        lease_seconds=1,
        counters=Counters(),
        token_text={7: "\x00", 8: "\ud800"}.__getitem__,
        keep_steps_tokens=10,
    )
    listen = runner._listener(held, SamplingParams(max_tokens=4), 1)
    provisional = {"positions": (1,), "token_ids": (8,)}
    listen(StepEvent("a/1", 0, 1, 1, (0,), (7,), (0.5,), "x", 1, 4, provisional=provisional))
    denoise = next(event.data for event in emitted if event.type == "denoise")
    assert (denoise["texts"], denoise["provisional"]["texts"]) == (["\ufffd"], ["?"])
    kept = runner._kept(held)
    assert kept is not None and unpacked(kept)["answers"][0]["steps"][0]["texts"] == ["\ufffd"]


def test_a_stream_tells_the_text_as_the_result_has_it() -> None:
    emitted: list[Event] = []
    held = HeldAttempts().add("a", 1)
    runner = Runner(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        emitted.append,
        worker_id="w",
        lease_seconds=1,
        counters=Counters(),
    )
    listen = runner._listener(held, SamplingParams(max_tokens=4), 1)
    listen(StepEvent("a/1", 0, 1, 1, (0,), (7,), (0.5,), "x\x00", 1, 4, canvas="x\x00?"))
    listen(StepEvent("a/1", 0, 2, 2, (1,), (8,), (0.5,), "y", 2, 4))
    told = [event.data for event in emitted if event.type == "progress"]
    assert "".join(data["text"] for data in told) == storable("x\x00y") == "x\ufffdy"
    assert ([data["offset"] for data in told], told[0]["canvas"]) == ([0, 2], "x\ufffd?")


def test_the_kept_canvas_is_as_long_as_what_was_committed_on_it() -> None:
    """The last block of a block-causal model reaches beyond the answer's limit."""
    log = StepLog(1, 100)
    log.note(0, 1, (0, 1), (5, 6), (0.5, 0.5), 6)
    log.note(0, 2, (7, 4), (5, 6), (0.5, 0.5), 6)
    log.note(0, 3, (), (), (), 3)
    kept = log.packed(str)
    assert kept is not None
    answer = unpacked(kept)["answers"][0]
    assert (answer["canvas"], answer["tokens_total"]) == (8, 3)
