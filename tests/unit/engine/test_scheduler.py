"""Policy without a model: who runs, who waits, who is set aside, whose K/V moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.engine.scheduler import GROW_STEPS, Decision, Scheduler


@dataclass(eq=False)
class FakeAnswer:
    request: FakeRequest
    memory: int = 1
    rows: int = 10
    divisible: bool = False


@dataclass(eq=False)
class FakeRequest:
    priority: int = 0
    sequences: list[FakeAnswer] = field(default_factory=list)


def request(priority: int = 0, n: int = 1, **answer: Any) -> FakeRequest:
    made = FakeRequest(priority)
    made.sequences = [FakeAnswer(made, **answer) for _ in range(n)]
    return made


def scheduler(slots: int = 2, *, max_rows: int = 1000, max_memory: int = 1000) -> Scheduler:
    return Scheduler(
        slots,
        max_rows=max_rows,
        max_memory=max_memory,
        memory=lambda a: a.memory,
        rows=lambda a: a.rows,  # type: ignore[attr-defined]
        divisible=lambda a: a.divisible,  # type: ignore[attr-defined]
    )


def add(to: Scheduler, *requests: FakeRequest) -> None:
    for one in requests:
        to.add(one)  # type: ignore[arg-type]


def who(decision: Decision) -> list[Any]:
    return [answer.request for answer, _ in decision.run]


def test_first_come_first_served_within_slots() -> None:
    s, a, b, c = scheduler(2), request(), request(), request()
    add(s, a, b, c)
    assert who(s.schedule()) == [a, b]
    assert s.waiting == 1
    s.finish(a.sequences[0])  # type: ignore[arg-type]
    assert set(map(id, who(s.schedule()))) == {id(b), id(c)}


def test_a_requests_answers_are_admitted_one_by_one() -> None:
    s, many = scheduler(2), request(n=3)
    add(s, many)
    assert len(s.schedule().run) == 2
    s.finish(many.sequences[0])  # type: ignore[arg-type]
    assert {id(a) for a, _ in s.schedule().run} == {id(many.sequences[1]), id(many.sequences[2])}


def test_bulk_is_set_aside_for_interactive_and_comes_back() -> None:
    s, bulk, other = scheduler(2), request(2), request(2)
    add(s, bulk, other)
    s.schedule()
    urgent = request(0)
    add(s, urgent)
    decision = s.schedule()
    assert set(map(id, who(decision))) == {id(urgent), id(bulk)}
    assert [a.request for a in decision.set_aside] == [other]
    assert decision.swap_out == []  # there is room: its K/V stays
    s.finish(urgent.sequences[0])  # type: ignore[arg-type]
    assert set(map(id, who(s.schedule()))) == {id(bulk), id(other)}
    assert s.preemptions == 1


def test_equals_do_not_displace_each_other() -> None:
    s, a, b = scheduler(1), request(1), request(1)
    add(s, a)
    s.schedule()
    add(s, b)
    for _ in range(5):
        assert who(s.schedule()) == [a]


def test_memory_bounds_who_runs_and_moves_what_is_set_aside() -> None:
    s, bulk = scheduler(4, max_memory=10), request(2, memory=8)
    add(s, bulk)
    first = s.schedule()
    assert [a.request for a in first.swap_in] == [bulk]
    urgent = request(0, memory=6)
    add(s, urgent)
    decision = s.schedule()
    assert who(decision) == [urgent]
    assert [a.request for a in decision.swap_out] == [bulk]
    assert [a.request for a in decision.swap_in] == [urgent]
    assert s.memory_in_use == 6
    s.finish(urgent.sequences[0])  # type: ignore[arg-type]
    back = s.schedule()
    assert [a.request for a in back.swap_in] == [bulk]


def test_a_large_request_is_not_passed_for_ever() -> None:
    s = scheduler(3, max_memory=10)
    running, large, small = request(memory=6), request(memory=9), request(memory=1)
    add(s, running, large, small)
    assert who(s.schedule()) == [running]  # small would fit, but behind one that does not
    s.finish(running.sequences[0])  # type: ignore[arg-type]
    assert set(map(id, who(s.schedule()))) == {id(large), id(small)}


def test_rows_are_shared_and_nobody_starves() -> None:
    s = scheduler(3, max_rows=15)
    a, b, c = (request(rows=10) for _ in range(3))
    add(s, a, b, c)
    turns = [id(who(s.schedule())[0]) for _ in range(6)]
    assert {turns.count(id(x)) for x in (a, b, c)} == {2}


def test_long_prompts_get_what_is_left() -> None:
    s, short, long = scheduler(2, max_rows=16), request(rows=10), request(rows=100, divisible=True)
    add(s, short, long)
    assert [rows for _, rows in s.schedule().run] == [10, 6]
    alone = scheduler(2, max_rows=16)
    add(alone, request(rows=100))
    assert [rows for _, rows in alone.schedule().run] == [100]  # cannot be cut: runs by itself


def test_after_running_out_of_memory_it_goes_on_with_less_and_grows_again() -> None:
    s = scheduler(8)
    add(s, *(request() for _ in range(8)))
    assert len(s.schedule().run) == 8
    s.shrink(8)
    assert len(s.schedule().run) == 4
    for _ in range(GROW_STEPS):
        s.schedule()
    assert len(s.schedule().run) == 5


def test_an_aborted_request_leaves_no_trace() -> None:
    s, a, b = scheduler(1), request(n=2), request()
    add(s, a, b)
    s.schedule()
    s.remove(a)  # type: ignore[arg-type]
    assert who(s.schedule()) == [b]
    assert s.waiting == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 30), st.booleans()),
        max_size=25,
    ),
    st.data(),
)
def test_invariants(arrivals: list[tuple[int, int, int, bool]], data: st.DataObject) -> None:
    """Slots and memory are never exceeded, nobody runs twice, the most urgent runs, and everybody
    finishes.
    """
    s = scheduler(3, max_rows=40, max_memory=6)
    pending = [request(p, memory=m, rows=r, divisible=d) for p, m, r, d in arrivals]
    alive: list[FakeRequest] = []
    for _ in range(400):
        if pending and data.draw(st.booleans()):
            alive.append(pending.pop(0))
            add(s, alive[-1])
        if not pending and not alive:
            break
        decision = s.schedule()
        running = [a for a, _ in decision.run]
        assert len(running) == len(set(map(id, running))) <= 3
        assert len(s.running) <= 3
        assert s.memory_in_use <= 6
        assert sum(a.memory for a in s.running) <= 6  # type: ignore[misc]
        assert bool(running) == bool(alive)
        if alive:
            assert min(a.request.priority for a in s.running) == min(x.priority for x in alive)
        for answer in running[: data.draw(st.integers(0, 2))]:
            s.finish(answer)
            alive.remove(answer.request)  # type: ignore[arg-type]
        if not pending and not alive:
            break
    else:
        while alive:
            for answer, _ in s.schedule().run:
                s.finish(answer)
                alive.remove(answer.request)  # type: ignore[arg-type]
    assert s.running == [] and s.waiting == 0
