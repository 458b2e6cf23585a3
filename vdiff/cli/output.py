"""How commands print: colours and width on a terminal, plain text without control codes elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vdiff.cli import exits

PIPE_WIDTH = 1_000  # nothing is wrapped for a program that reads lines
_STYLES = {
    "succeeded": "green", "completed": "green", "running": "cyan", "in_progress": "cyan", "failed": "red", "expired": "red",
    "cancelled": "yellow", "cancelling": "yellow",
}  # fmt: skip


def style_of(status: str) -> str:
    return _STYLES.get(status, "default")


def console(*, err: bool = False) -> Console:
    """Of stdout, or of stderr for what is not the answer."""
    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


class Listing:
    """A table as `ps` prints them.

    Args:
        shrink: columns that give way where the terminal is narrow; all others, ids to be copied among them, stay whole.
    """

    def __init__(self, *columns: str, shrink: Collection[str] = ()) -> None:
        self._shrink = [name in shrink for name in columns]
        self.table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in columns:
            self.table.add_column(self._cell(name, name in shrink), no_wrap=name not in shrink)

    @staticmethod
    def _cell(text: str, shrinks: bool, style: str = "") -> Text:
        return Text(text, style=style, no_wrap=True, overflow="ellipsis") if shrinks else Text(text, style=style)

    def add(self, *cells: str, status: int | None = None) -> None:
        """A row of plain texts; the cell at `status` is coloured by what it says."""
        self.table.add_row(
            *(
                self._cell(cell, shrinks, style_of(cell) if place == status else "")
                for place, (cell, shrinks) in enumerate(zip(cells, self._shrink, strict=True))
            )
        )

    def print(self, nothing: str) -> None:
        console().print(self.table if self.table.row_count else nothing)


@contextmanager
def detached(come_back: str) -> Iterator[None]:
    """Ctrl-C leaves the server at it, and says how to look again."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ndetached; it goes on. Come back with: {come_back}", err=True)
        raise typer.Exit(exits.INTERRUPTED) from None
