"""The transition table against the diagram that people read."""

from __future__ import annotations

import pytest

from shared.jobs.status import TERMINAL, TRANSITIONS, AttemptOutcome, JobStatus, Priority, sources

S = JobStatus


def test_the_states_are_a_closed_set() -> None:
    assert [s.value for s in JobStatus] == ["queued", "running", "succeeded", "failed", "cancelled", "expired"]
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
    assert sorted(Priority, key=lambda p: p.rank) == [Priority.INTERACTIVE, Priority.NORMAL, Priority.BULK]
    assert Priority.INTERACTIVE.rank == 0
