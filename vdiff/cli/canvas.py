"""A job's text on a terminal while it comes out of the noise: committed text plain, what is
proposed dim, masks as shades.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vdiff.cli.output import visible

if TYPE_CHECKING:
    from vdiff.client import Event

MASK = "\u2591"  # how the server shows one
FRAMES_PER_SECOND = 20


class Canvas:
    """The answers of one job as its events tell them."""

    def __init__(self) -> None:
        self._committed: dict[int, str] = {}
        self._whole: dict[int, str | None] = {}
        self._status = ""

    def hear(self, event: Event) -> None:
        """One event of the job."""
        data = event.data
        if event.type == "progress":
            index = data["index"]
            before = self._committed.get(index, "")
            self._committed[index] = before[: data["offset"]] + data["text"]
            self._whole[index] = data.get("canvas") or self._whole.get(index)
            self._status = (
                f"step {data['step']}, {data['tokens_committed']} of {data['tokens_total']} tokens"
            )
        elif event.type == "queued":
            self._status = "queued, waiting for a worker"
        elif event.type == "started":
            self._committed, self._whole = {}, {}  # another attempt begins anew
            self._status = "started"
        elif event.type == "done":
            self._status = ""
            for choice in (data.get("result") or {}).get("choices", ()):
                text = (
                    choice["message"]["content"] if "message" in choice else choice.get("text", "")
                )
                self._committed[choice["index"]], self._whole[choice["index"]] = text or "", None

    def text(self, index: int) -> Text:
        committed, whole = self._committed.get(index, ""), self._whole.get(index)
        if whole is None:
            return Text(visible(committed))
        # Committed may be ahead of the canvas' first characters only by what stop strings hide.
        shared = len(committed) if whole.startswith(committed) else 0
        rest = Text(visible(whole[shared:]), style="dim")
        return Text(visible(whole[:shared])) + rest

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self.text(index) for index in sorted(self._committed)]
        if self._status:
            parts.append(Text(self._status, style="cyan"))
        return Group(*parts)


def draw(events: Iterator[Event], out: Console) -> Canvas:
    """Show a job's events until it is over; the finished text stays on the screen."""
    canvas = Canvas()
    with Live(
        canvas, console=out, refresh_per_second=FRAMES_PER_SECOND, vertical_overflow="visible"
    ) as live:
        for event in events:
            canvas.hear(event)
            if event.type == "done":
                live.refresh()
    return canvas
