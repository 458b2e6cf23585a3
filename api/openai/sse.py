"""A job's events as OpenAI's stream chunks. Pure: events in, chunks out; no server needed to test
it.

Deltas are append-only. Events may repeat (a batch sent again, a second attempt of the job, which by
its frozen seed says the same) or be missing (Redis lost some); `offset` tells, and what is missing
comes with the finished job. Should a second attempt nevertheless differ from what was sent, the
stream ends with an error rather than with a mixture. Log-probabilities come whole, with the finish
reason: tokens are not committed from left to right, deltas are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.canvas import STEP_BYTES, CanvasReader
from shared.jobs.responses import CHAT, response_id
from shared.jobs.status import JobStatus


class Diverged(Exception):
    """The finished text does not continue what was sent."""


class ChunkStream:
    """The chunks of one response.

    Args:
        visualize: each delta is the whole current text instead, to be replaced (Mercury's
            "diffusing" semantics); the committed part of it stands under `vdiff`.
    """

    def __init__(
        self,
        endpoint: str,
        job_id: str,
        model: str,
        created: int,
        *,
        n: int,
        include_usage: bool,
        visualize: bool,
    ) -> None:
        self._chat = endpoint == CHAT
        self._common = {
            "id": response_id(endpoint, job_id),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": model,
        }
        self._include_usage = include_usage
        self._visualize = visualize
        self._n = n
        self._sent = [""] * n  # committed text given out, per choice
        self._canvases = [CanvasReader() for _ in range(n)]
        self._paid = [0] * n  # bytes that canvases may take

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return {**self._common, "choices": choices, **usage, **more}

    def _choice(
        self,
        index: int,
        text: str | None,
        finish_reason: str | None = None,
        logprobs: Any = None,
        **delta: Any,
    ) -> dict[str, Any]:
        if self._chat:
            content: dict[str, Any] = {
                "delta": delta if text is None else {**delta, "content": text}
            }
        else:
            content = {"text": text or ""}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def start(self) -> list[dict[str, Any]]:
        """Chat streams begin with the role."""
        if not self._chat:
            return []
        return [self._chunk([self._choice(i, "", role="assistant")]) for i in range(self._n)]

    def progress(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One `progress` event."""
        index = data["index"]
        if not 0 <= index < self._n:
            return []
        before = self._sent[index]
        offset, text = data["offset"], data["text"]
        fresh = (
            text[len(before) - offset :] if offset <= len(before) else ""
        )  # beyond a hole: wait for the end
        self._sent[index] = before + fresh
        if self._visualize:
            reader = self._canvases[index]
            canvas = reader.canvas if reader.hear(data) else None
            self._paid[index] += STEP_BYTES
            if (
                canvas is None
                or (cost := len(json.dumps([canvas, self._sent[index]]))) > self._paid[index]
            ):
                # of a long text, as many steps are left out as keep the whole stream's bytes linear
                return []
            self._paid[index] -= cost
            extras = {
                "diffusing": True,
                "replace": True,
                "committed": self._sent[index],
                "step": data["step"],
            }
            return [self._chunk([self._choice(index, canvas)], vdiff=extras)]
        return [self._chunk([self._choice(index, fresh)])] if fresh else []

    def finish(self, row: Mapping[Any, Any]) -> list[dict[str, Any]]:
        """The rest of the text, the finish reasons and the usage of a job that succeeded.

        Raises:
            Diverged: the text differs from what was sent.
        """
        assert row["status"] == JobStatus.SUCCEEDED
        result = row["result"]
        chunks = []
        for choice in result["choices"]:
            index = choice["index"]
            text = choice["message"]["content"] if self._chat else choice["text"]
            if self._visualize:
                extras = {"diffusing": False, "replace": True, "committed": text}
                chunks.append(self._chunk([self._choice(index, text)], vdiff=extras))
            else:
                if not text.startswith(self._sent[index]):
                    raise Diverged
                rest = text[len(self._sent[index]) :]
                if rest:
                    chunks.append(self._chunk([self._choice(index, rest)]))
            chunks.append(
                self._chunk(
                    [self._choice(index, None, choice["finish_reason"], choice["logprobs"])],
                    vdiff=result["vdiff"],
                )
            )
        if self._include_usage:
            chunks.append(
                {**self._common, "choices": [], "usage": result["usage"], "vdiff": result["vdiff"]}
            )
        return chunks
