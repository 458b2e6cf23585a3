"""The transition table against the diagram that people read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.jobs.status import TERMINAL, TRANSITIONS, AttemptOutcome, JobStatus, Priority, sources

S = JobStatus
DOCS = Path(__file__).resolve().parents[4] / "docs"


def test_the_states_are_a_closed_set() -> None:
    assert [s.value for s in JobStatus] == [
        "queued",
        "running",
        "succeeded",
        "failed",
        "cancelled",
        "expired",
    ]
    assert set(TRANSITIONS) == set(JobStatus)
    assert frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.EXPIRED}) == TERMINAL


def test_a_success_is_final_and_comes_only_from_running() -> None:
    assert TRANSITIONS[S.SUCCEEDED] == frozenset()
    assert sources(S.SUCCEEDED) == ("running",)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_no_end_leads_anywhere_but_back_to_the_queue(state: JobStatus) -> None:
    assert TRANSITIONS[state] <= {S.QUEUED}


def test_only_a_queued_job_is_claimed() -> None:
    assert sources(S.RUNNING) == ("queued",)


def test_every_end_is_reached_and_every_running_job_can_go_back() -> None:
    assert all("running" in sources(end) for end in TERMINAL)
    assert S.QUEUED in TRANSITIONS[S.RUNNING]
    assert S.CANCELLED in TRANSITIONS[S.QUEUED]


def test_an_attempt_ends_as_its_job_or_is_taken_away() -> None:
    ends = {o.value for o in AttemptOutcome} - {"running"}
    assert {s.value for s in TERMINAL} | {"lost", "drained"} == ends


def test_priorities_rank() -> None:
    assert sorted(Priority, key=lambda p: p.rank) == [
        Priority.INTERACTIVE,
        Priority.NORMAL,
        Priority.BULK,
    ]
    assert Priority.INTERACTIVE.rank == 0


def test_the_drawing_and_the_page_have_these_moves_and_no_others() -> None:
    """docs/images/job-states.svg, whose arrows have ids, and the table in docs/jobs.md."""
    drawing = (DOCS / "images" / "job-states.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r'<path id="(\w+)-(\w+)"', drawing))
    assert drawn == {(s.value, t.value) for s, targets in TRANSITIONS.items() for t in targets}
    page = (DOCS / "jobs.md").read_text(encoding="utf-8")
    assert "(images/job-states.svg)" in page
    found = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    rows = {state: (comes, goes) for state, comes, goes in found if state in list(S)}
    assert list(rows) == [s.value for s in S]
    for state in S:
        comes, goes = rows[state.value]
        assert ("nobody" in goes) == (not TRANSITIONS[state]), state
        assert ("(retry)" in goes) == (TRANSITIONS[state] == {S.QUEUED}), (
            state
        )  # all that an end may do
        assert ("(claim" in comes) == (state is S.RUNNING), state
