"""Output of commands: colours and width on a terminal, plain text without control codes elsewhere."""

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
    "succeeded": "green",
    "completed": "green",
    "running": "cyan",
    "in_progress": "cyan",
    "failed": "red",
    "expired": "red",
    "cancelled": "yellow",
    "cancelling": "yellow",
}


# Control codes as signs, all but tab and line end.
_SIGNS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_SIGNS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """For a terminal: what a model or another user wrote must not command it."""
    return text.translate(_SIGNS)


def write(text: str) -> None:
    """A line that somebody else wrote: as it is for a program, visible on a terminal. Never through
    rich, which takes `[b]` for a style, `:bug:` for a picture and a tab for spaces.
    """
    typer.echo(
        visible(text) if sys.stdout.isatty() else text, color=True
    )  # else it takes escape sequences out


def aside(text: str) -> None:
    """A line on stderr; by print, because typer's echo goes past a bar that is drawn there and
    lands in its line.
    """
    print(text, file=sys.stderr, flush=True)


def fact(name: str, value: object, style: str = "") -> None:
    """A line of what `show` commands tell: the name, padded, and the value."""
    console().print(Text.assemble(f"{name:<10}", (visible(str(value)), style)), soft_wrap=True)


def style_of(status: str) -> str:
    return _STYLES.get(status, "default")


def console(*, err: bool = False) -> Console:
    """Return the console of stdout, or of stderr for everything but the answer."""
    stream = sys.stderr if err else sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, emoji=False
    )


class Listing:
    """A table as `ps` prints them.

    Args:
        shrink: columns that give way where the terminal is narrow; all others, ids to be copied
            among them, stay whole.
    """

    def __init__(self, *columns: str, shrink: Collection[str] = ()) -> None:
        self._shrink = [name in shrink for name in columns]
        self.table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in columns:
            self.table.add_column(self._cell(name, name in shrink), no_wrap=name not in shrink)

    @staticmethod
    def _cell(text: str, shrinks: bool, style: str = "") -> Text:
        cell = visible(text).replace("\n", "\u240a")  # a row is a line
        return (
            Text(cell, style=style, no_wrap=True, overflow="ellipsis")
            if shrinks
            else Text(cell, style=style)
        )

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
