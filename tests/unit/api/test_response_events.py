"""The Responses API's stream: order, numbers that survive a reconnect, lost events, jobs that fail
or say something else.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from api.openai.response_events import ResponseEvents
from api.openai.sse import Diverged
from shared.jobs.response_objects import build_result
from shared.jobs.response_requests import parse
from shared.jobs.tasks import ResponseTask

TEXT = "Hello, world"
TASK = ResponseTask(parse({"model": "m", "input": "x"}, streaming=True).shown, (("user", "x"),))
PARAMS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "task": TASK.to_json()}
ROW: dict[str, Any] = {
    "id": "job_" + "0" * 26,
    "model": "m",
    "status": "queued",
    "params": PARAMS,
    "error": None,
    "result": None,
    "created_at": datetime(2026, 1, 1, tzinfo=UTC),
}


def done(text: str = TEXT, finish_reason: str = "stop") -> dict[str, Any]:
    result = build_result(
        job_id=ROW["id"],
        model="m",
        created=1,
        completed=2,
        params=PARAMS,
        prompt_tokens=3,
        extras={},
        choice={"text": text, "token_ids": [1, 2], "finish_reason": finish_reason},
    )
    return {**ROW, "status": "succeeded", "result": result}


def played(
    pieces: list[tuple[int, str]], after: int | None = None, end: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    events = ResponseEvents(ROW, after)
    made = events.start()
    for offset, text in pieces:
        made += events.progress({"offset": offset, "text": text})
    return made + events.finish(end or done())


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def test_the_order_of_events() -> None:
    events = played([(0, ""), (0, "Hello"), (5, ", "), (7, "world")])
    assert [e["type"].removeprefix("response.") for e in events] == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [e["sequence_number"] for e in events] == [0, 1, 2, 3, 4, 9, 11, 16, 17, 18, 19, 20]
    assert text_of(events) == TEXT == events[-1]["response"]["output"][0]["content"][0]["text"]
    assert played([], end=done(finish_reason="length"))[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize(
    "cut", [[], [(0, "Hel")], [(0, "Hello, "), (0, "Hello, wo")], [(5, ", lost")]]
)
def test_resuming_anywhere_gives_the_rest_however_events_are_cut(
    cut: list[tuple[int, str]],
) -> None:
    whole = played([(0, "Hello"), (5, ", "), (7, "world")])
    for event in whole:
        after = event["sequence_number"]
        had = [e for e in whole if e["sequence_number"] <= after]
        rest = played(cut if cut != [(5, ", lost")] else [(5, ", world")], after=after)
        assert text_of(had) + text_of(rest) == TEXT
        assert all(e["sequence_number"] > after for e in rest)
        kinds = [e["type"] for e in had + rest if e["type"] != "response.output_text.delta"]
        assert kinds == [e["type"] for e in whole if e["type"] != "response.output_text.delta"]


def test_jobs_that_fail_and_texts_that_differ() -> None:
    failed = {
        **ROW,
        "status": "failed",
        "error": {"code": "not_finite", "message": "NaN", "param": None},
    }
    last = played([(0, "Hel")], end=failed)[-1]
    assert (
        last["type"] == "response.failed"
        and last["response"]["error"]["message"] == "not_finite: NaN"
    )
    assert played([(0, "Hel")], after=900, end=failed)[-1]["sequence_number"] == 901
    cancelled = played([], end={**ROW, "status": "cancelled"})[-1]
    assert cancelled["response"]["status"] == "cancelled" and cancelled["response"]["error"] is None
    with pytest.raises(Diverged):
        played([(0, "Hel")], end=done("Other"))
