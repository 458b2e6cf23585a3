"""A progress bar that fits where it is: drawn on a terminal, one line that is written over in a
notebook, else now and then a line of its own, without control codes, so that a log stays readable.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0


def duration(seconds: float) -> str:
    """1h02m, 3m20s, 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def in_notebook() -> bool:
    return "ipykernel" in sys.modules


class Bar:
    """Tell it `update(done, failed, total)` as often as you like.

    Args:
        shown: False draws nothing.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None = None,
        shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._label = label
        self._shown = shown
        self._stream = sys.stderr if stream is None else stream
        self._began = self._said_at = time.monotonic()
        self._counts: tuple[int, int, int | None] = (0, 0, total)
        self._said: tuple[int, int, int | None] | None = None  # the counts of the last line
        self._drawn: Progress | None = None
        if shown and self._stream.isatty():
            columns = (
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}"),
                BarColumn(None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[errors]}"),
            )
            self._drawn = Progress(*columns, console=Console(file=self._stream), expand=True)
            self._task = self._drawn.add_task(label, total=total, rate="", errors="")

    def __enter__(self) -> Bar:
        if self._drawn is not None:
            self._drawn.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        elif self._shown and self._counts != self._said:
            self._say(last=True)
        elif self._shown and in_notebook():
            self._stream.write("\n")

    def update(self, done: int, failed: int = 0, total: int | None = None) -> None:
        self._counts = (done, failed, total)
        now = time.monotonic()
        if self._drawn is not None:
            rate = done / max(now - self._began, 1e-9)
            self._drawn.update(
                self._task,
                completed=done,
                total=total,
                rate=f"{rate:.1f}/s" if done else "",
                errors=f"[red]{failed} failed[/]" if failed else "",
            )
        elif self._shown and now - self._said_at >= (1.0 if in_notebook() else LINE_SECONDS):
            self._said_at = now
            self._say()

    def text(self) -> str:
        """`prompts: 120/1000, 2 failed, 14.1/s, ETA 1m02s`"""
        done, failed, total = self._counts
        rate = done / max(time.monotonic() - self._began, 1e-9)
        parts = [f"{done}" if total is None else f"{done}/{total}"]
        if failed:
            parts.append(f"{failed} failed")
        if done:
            parts.append(f"{rate:.1f}/s")
        if done and total is not None and done < total:
            parts.append(f"ETA {duration((total - done) / rate)}")
        return f"{self._label}: {', '.join(parts)}"

    def _say(self, *, last: bool = False) -> None:
        self._said = self._counts
        if in_notebook():
            self._stream.write(f"\r{self.text():<79}" + ("\n" if last else ""))
        else:
            self._stream.write(self.text() + "\n")
        self._stream.flush()
