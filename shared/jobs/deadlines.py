"""The four clocks of a job, as a client gives them. Pure; they are enforced in
`shared.jobs.repository`.

start_by         expired unless a worker began by then              a moment
complete_by      expired unless it succeeded by then                a moment
max_run_seconds  expired when one attempt takes longer              seconds
retain_for       input and output are purged so long after the end  seconds
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from shared.checks import plain
from shared.errors import InvalidParameter, UnknownParameter

FIELDS = ("start_by", "complete_by", "max_run_seconds", "retain_for")
MAX_RUN_SECONDS = 7 * 86_400.0
MAX_RETAIN_SECONDS = 10 * 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    start_by: datetime | None = None
    complete_by: datetime | None = None
    max_run_seconds: float | None = None
    retain_for: float | None = None

    def refuse_passed(self, now: datetime) -> None:
        """Raises InvalidParameter."""
        for name in ("start_by", "complete_by"):
            moment = getattr(self, name)
            if moment is not None and moment <= now:
                raise InvalidParameter(
                    f"deadlines.{name} is in the past", param=f"deadlines.{name}"
                )

    def columns(self) -> dict[str, Any]:
        return {
            "start_by": self.start_by,
            "complete_by": self.complete_by,
            "max_run_seconds": self.max_run_seconds,
            "retain_seconds": self.retain_for,
        }


def moment_of(value: Any, param: str) -> datetime:
    """Unix seconds, or ISO 8601 (UTC when it names no zone). Raises InvalidParameter."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            # In UTC already here: at the ends of the calendar another zone's moment has none, and
            # no driver could send it.
            return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise InvalidParameter(f"{param} must be Unix seconds or ISO 8601", param=param)


def deadlines_of(value: Any, *, default_retain_seconds: float | None = None) -> Deadlines:
    """The `deadlines` of a request; `refuse_passed` looks at the clock. Raises InvalidParameter,
    UnknownParameter.
    """
    if not isinstance(value, dict):
        raise InvalidParameter("deadlines must be an object", param="deadlines")
    for name in value:
        if name not in FIELDS:
            param = f"deadlines.{name[:80]}"
            raise UnknownParameter(
                f"{param} is not a deadline; known: {', '.join(FIELDS)}", param=param
            )
    given = {name: v for name, v in value.items() if v is not None}
    moments: dict[str, datetime] = {}
    for name in ("start_by", "complete_by"):
        if name in given:
            moments[name] = moment_of(given[name], f"deadlines.{name}")
    if len(moments) == 2 and moments["complete_by"] < moments["start_by"]:
        raise InvalidParameter(
            "deadlines.complete_by is before start_by", param="deadlines.complete_by"
        )
    retain = _seconds(given, "retain_for", MAX_RETAIN_SECONDS)
    return Deadlines(
        moments.get("start_by"),
        moments.get("complete_by"),
        _seconds(given, "max_run_seconds", MAX_RUN_SECONDS),
        default_retain_seconds if retain is None else retain,
    )


def _seconds(given: dict[str, Any], name: str, longest: float) -> float | None:
    if name not in given:
        return None
    value, param = given[name], f"deadlines.{name}"
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < number <= longest:
        raise InvalidParameter(
            f"{param} must be seconds above 0 and at most {plain(longest)}", param=param
        )
    return float(number)
