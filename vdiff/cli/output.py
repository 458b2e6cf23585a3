"""How commands print: colours and width on a terminal, plain text without control codes elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 1_000  # nothing is wrapped for a program that reads lines


def console(*, err: bool = False) -> Console:
    """Of stdout, or of stderr for what is not the answer."""
    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)
