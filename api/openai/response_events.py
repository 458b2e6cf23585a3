"""A job's events as the Responses API's stream. Pure: events in, events out.

Sequence numbers are made of the text, not counted: a delta's says how many characters have been
sent, so that a client that comes back with `starting_after` gets the rest exactly, from whichever
process, and however events were cut or lost before.

    0 created   1 queued   2 in_progress   3 output_item.added   4 content_part.added
    4 + characters: output_text.delta      then, behind the last of n: 5 + n text, 6 + n part, 7 + n
                                                                 item done, 8 + n the end
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.openai.sse import Diverged
from shared.jobs.response_objects import message, message_id, of_row, output_text
from shared.jobs.status import JobStatus

Sent = dict[str, Any]
_DELTA = 4


class ResponseEvents:
    """The events of one response.

    Args:
        row: its job when the stream begins.
        after: the last sequence number that the client has; None: nothing.
    """

    def __init__(self, row: Mapping[Any, Any], after: int | None = None) -> None:
        self._row, self._job_id = row, row["id"]
        self._after = -1 if after is None else after
        self._sent = ""
        self._opened = False

    def start(self) -> list[Sent]:
        began = {
            **of_row(self._row),
            "output": [],
            "usage": None,
            "completed_at": None,
            "incomplete_details": None,
        }
        if self._row["status"] == JobStatus.QUEUED:
            queued = {"type": "response.queued", "response": began}
            return self._new({"type": "response.created", "response": began}, 0) + self._new(
                queued, 1
            )
        return self._new(
            {"type": "response.created", "response": {**began, "status": "in_progress"}}, 0
        )

    def progress(self, data: Mapping[str, Any]) -> list[Sent]:
        """One `progress` event of the job."""
        before, offset, text = self._sent, data["offset"], data["text"]
        fresh = (
            text[len(before) - offset :] if offset <= len(before) else ""
        )  # beyond a hole: wait for the end
        return self._open() + self._delta(fresh)

    def finish(self, row: Mapping[Any, Any]) -> list[Sent]:
        """The rest of a job that is over.

        Raises:
            Diverged: the text differs from what was sent.
        """
        response = of_row(row)
        if row["status"] != JobStatus.SUCCEEDED:
            number = max(8 + len(self._sent), self._after + 1)
            return self._new({"type": "response.failed", "response": response}, number)
        [item] = response["output"]
        [part] = item["content"]
        text = part["text"]
        if not text.startswith(self._sent):
            raise Diverged
        events = self._open() + self._delta(text[len(self._sent) :])
        place, n = self._place(), len(text)
        done = {
            "type": "response.output_text.done",
            **place,
            "text": text,
            "logprobs": part["logprobs"],
        }
        events += self._new(done, 5 + n)
        events += self._new({"type": "response.content_part.done", **place, "part": part}, 6 + n)
        events += self._new(
            {"type": "response.output_item.done", "output_index": 0, "item": item}, 7 + n
        )
        return events + self._new(
            {"type": f"response.{response['status']}", "response": response}, 8 + n
        )

    def error(self, code: str, text: str) -> Sent:
        """Return the event that ends a stream that cannot go on."""
        number = max(8 + len(self._sent), self._after + 1)
        return {
            "type": "error",
            "code": code,
            "message": text,
            "param": None,
            "sequence_number": number,
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": message_id(self._job_id), "output_index": 0, "content_index": 0}

    def _open(self) -> list[Sent]:
        if self._opened:
            return []
        self._opened = True
        running = {**of_row({**self._row, "status": JobStatus.RUNNING}), "output": []}
        item = {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": message(self._job_id, "in_progress"),
        }
        part = {"type": "response.content_part.added", **self._place(), "part": output_text("")}
        began = {"type": "response.in_progress", "response": running}
        return self._new(began, 2) + self._new(item, 3) + self._new(part, 4)

    def _delta(self, fresh: str) -> list[Sent]:
        if not fresh:
            return []
        self._sent += fresh
        number = _DELTA + len(self._sent)
        fresh = (
            fresh[-(number - self._after) :]
            if self._after >= _DELTA and number > self._after
            else fresh
        )
        delta = {
            "type": "response.output_text.delta",
            **self._place(),
            "delta": fresh,
            "logprobs": [],
        }
        return self._new(delta, number)

    def _new(self, event: Sent, number: int) -> list[Sent]:
        """The event, unless the client has it."""
        return [{**event, "sequence_number": number}] if number > self._after else []
