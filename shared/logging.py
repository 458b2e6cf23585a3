"""structlog, once per process: readable lines for people, JSON for machines, the same events for
both.

Prompts and generated text are never logged: log ids, counts and durations. The text of an exception
may quote what a client sent, so a traceback has its frames and the exception's name, and its text
only at DEBUG. Lines of other libraries (celery, uvicorn, alembic) go through the same renderer.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any, Literal, TextIO

import structlog

_process: dict[str, str] = {}


def identify(**names: str) -> None:
    """Put these on every line of this process, whatever thread writes it: worker_id=... for one."""
    _process.update(names)


def _identified(
    logger: Any, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {**_process, **event}


def frames(exc: BaseException | None) -> str:
    """A traceback without the exceptions' texts, the first cause first."""
    parts: list[str] = []
    while exc is not None and len(parts) < 10:
        name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
        parts.insert(0, "".join(traceback.format_tb(exc.__traceback__)) + name)
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return "\n\n".join(parts)


def _discreet(
    logger: Any, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    given = event.pop("exc_info", None)
    if given:
        exc = (
            given[1]
            if isinstance(given, tuple)
            else given
            if isinstance(given, BaseException)
            else sys.exc_info()[1]
        )
        event["exception"] = frames(exc)
    return event


def setup_logging(
    level: str = "INFO",
    log_format: Literal["console", "json"] = "console",
    *,
    stream: TextIO | None = None,
) -> None:
    """Send everything to `stream` (default stderr) in one format; calling it again replaces the
    former setup.
    """
    output = sys.stderr if stream is None else stream
    shared: list[structlog.typing.Processor] = [
        _identified,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    discreet: list[structlog.typing.Processor] = [] if level == "DEBUG" else [_discreet]
    if log_format == "json":
        rendering: list[structlog.typing.Processor] = [
            *discreet,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # Not rich's traceback, structlog's default: it prints local variables, and with them
        # prompts and keys.
        plain = structlog.dev.plain_traceback
        rendering = [
            *discreet,
            structlog.dev.ConsoleRenderer(colors=output.isatty(), exception_formatter=plain),
        ]

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.PositionalArgumentsFormatter()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Their lines have whole URLs, and those of webhooks may have secrets in them.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Two lines at every start that nobody needs.
    logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
