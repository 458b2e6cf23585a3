"""Weighted turns between keys. Pure, so that fairness is tested without a database.

Start-time fair queueing. A lane's clock is the virtual time at which its next turn begins; a turn
moves it on by 1 / weight. The lane with the earliest clock is next. A lane that was idle begins at
the queue's clock, the beginning of the turn that was given last: it neither saves turns up nor
waits for those that others had meanwhile. So a key's first job is next after the turn that is being
given, however many jobs another one has.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

Who = tuple[str, str]  # tenant and key, whose lane it is


@dataclass(frozen=True, slots=True)
class LaneView:
    """The part of a lane that a round reads: its first jobs, in their order."""

    who: Who
    clock: float
    weight: int
    jobs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Turns:
    """The jobs to be pushed, in order, and the clocks afterwards."""

    jobs: list[str] = field(default_factory=list)
    lane_clocks: dict[Who, float] = field(default_factory=dict)  # of those that had a turn
    clock: float = 0.0


def take_turns(lanes: Sequence[LaneView], clock: float, room: int) -> Turns:
    """At most `room` jobs, one turn at a time."""
    waiting = [(max(lane.clock, clock), lane.who, 0, lane) for lane in lanes if lane.jobs]
    heapq.heapify(waiting)
    jobs: list[str] = []
    clocks: dict[Who, float] = {}
    while waiting and len(jobs) < room:
        begins, who, index, lane = heapq.heappop(waiting)
        jobs.append(lane.jobs[index])
        clock = begins
        clocks[who] = begins + 1 / lane.weight
        if index + 1 < len(lane.jobs):
            heapq.heappush(waiting, (clocks[who], who, index + 1, lane))
    return Turns(jobs, clocks, clock)
