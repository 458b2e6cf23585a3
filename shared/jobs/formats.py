"""Versions of rows and messages, so that old and new programs work side by side.

`ROW_FORMAT` is that of a job's row: its `params`, its `body`, and what a worker has to make of
them. A release that writes rows which the one before it would misread raises it. A worker claims
only rows that it understands; the others stay queued, without an attempt, for a newer one. The
message (`shared.queue.messages`) has a version of its own.
"""

from __future__ import annotations

ROW_FORMAT = 1
# A row that must run apart from others (`shared.jobs.suspects`). A program that does not know this
# rule leaves it alone.
SUSPECT_FORMAT = 2
UNDERSTOOD_FORMAT = 2
