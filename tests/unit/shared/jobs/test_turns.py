"""Weighted turns: nobody waits for another's backlog, weights count, and idle lanes save nothing
up.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shared.jobs.estimate import OUTCOMES_MIN, Calibration, place
from shared.jobs.turns import LaneView, take_turns


def lane(tenant: str, jobs: int, *, clock: float = 0.0, weight: int = 1) -> LaneView:
    return LaneView((tenant, ""), clock, weight, [f"{tenant}{i}" for i in range(jobs)])


def test_two_lanes_alternate_and_each_keeps_its_order() -> None:
    assert take_turns([lane("a", 3), lane("b", 3)], 0.0, 6).jobs == [
        "a0",
        "b0",
        "a1",
        "b1",
        "a2",
        "b2",
    ]


def test_a_late_comer_is_next_after_a_long_backlog() -> None:
    first = take_turns([lane("a", 1000)], 0.0, 500)
    then = take_turns(
        [lane("a", 500, clock=first.lane_clocks[("a", "")]), lane("b", 1)], first.clock, 2
    )
    assert "b0" in then.jobs


def test_who_was_idle_has_saved_nothing_up() -> None:
    turns = take_turns([lane("a", 10, clock=100.0), lane("b", 10, clock=3.0)], 100.0, 10)
    assert Counter(j[0] for j in turns.jobs) == {"a": 5, "b": 5}


def test_weights_are_turns() -> None:
    turns = take_turns([lane("a", 90, weight=3), lane("b", 90)], 0.0, 40)
    assert Counter(j[0] for j in turns.jobs) == {"a": 30, "b": 10}


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 8),
)
def test_over_many_rounds_all_is_served_fairly(
    lanes: list[tuple[int, int]], rounds: int, room: int
) -> None:
    left = {chr(97 + i): list(range(n)) for i, (n, _) in enumerate(lanes)}
    weights = {chr(97 + i): w for i, (_, w) in enumerate(lanes)}
    clocks = dict.fromkeys(left, 0.0)
    served: Counter[str] = Counter()
    clock = 0.0
    for _ in range(rounds):
        views = [
            LaneView((t, ""), clocks[t], weights[t], [f"{t}{i}" for i in jobs[:room]])
            for t, jobs in left.items()
        ]
        waiting = sum(len(v) for v in left.values())
        turns = take_turns(views, clock, room)
        assert len(turns.jobs) == min(room, waiting)  # no place stays empty
        assert turns.clock >= clock
        clock = turns.clock
        clocks.update({who: at for (who, _), at in turns.lane_clocks.items()})
        for job in turns.jobs:
            assert left[job[0]].pop(0) == int(job[1:])  # in its lane's order
            served[job[0]] += 1
        backlogged = [t for t in left if left[t]]
        for one in backlogged:
            for other in backlogged:
                assert (
                    served[one] / weights[one] - served[other] / weights[other]
                    <= 1 / weights[one] + 1 / weights[other] + 1e-9
                )


def test_a_place_counts_urgent_lanes_and_a_turn_of_each_equal() -> None:
    depths = [
        {"priority": "interactive", "tenant": "x", "key_id": "", "jobs": 7},
        {"priority": "normal", "tenant": "me", "key_id": "1", "jobs": 5},
        {"priority": "normal", "tenant": "me", "key_id": "2", "jobs": 50_000},
        {"priority": "bulk", "tenant": "x", "key_id": "", "jobs": 9},
    ]
    assert (
        place({"priority": "normal", "tenant": "me", "key_id": "1"}, depths, ahead=2)
        == 7 + 2 + 3 + 1
    )


def test_a_range_comes_from_what_happened() -> None:
    assert Calibration.of([(1.0, 1.0)] * (OUTCOMES_MIN - 1)).range_of(10.0) is None
    found = Calibration.of([(1.0, 0.5 + i / 100) for i in range(101)]).range_of(10.0)
    assert found is not None
    assert 5.0 <= found[0] < 7.0 < 13.0 < found[1] <= 15.0
