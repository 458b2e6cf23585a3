"""Exceptions in log lines: where and which, not their text, which may quote what a client sent."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from shared import logging as ours
from shared.logging import frames, identify, setup_logging

MARK = "Marzipan-4711"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    ours._process.clear()


def broken() -> None:
    try:
        int(f"{MARK}-inner")
    except ValueError as exc:
        raise KeyError(f"{MARK}-outer") from exc


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_traceback_has_frames_and_names_but_no_text(log_format: str, foreign: bool) -> None:
    output = io.StringIO()
    setup_logging("INFO", log_format, stream=output)  # type: ignore[arg-type]
    try:
        broken()
    except KeyError:
        if foreign:
            logging.getLogger("uvicorn.error").exception("it broke")
        else:
            structlog.get_logger("x").exception("it broke")
    said = output.getvalue()
    assert MARK not in said
    assert "KeyError" in said and "ValueError" in said and "in broken" in said
    assert said.index("ValueError") < said.index("KeyError")  # the cause first
    if log_format == "json":
        assert json.loads(said)["event"] == "it broke"


def test_at_debug_the_text_is_there() -> None:
    output = io.StringIO()
    setup_logging("DEBUG", "json", stream=output)
    try:
        broken()
    except KeyError:
        structlog.get_logger("x").exception("it broke")
    assert f"{MARK}-inner" in output.getvalue() and f"{MARK}-outer" in output.getvalue()


def test_urls_of_the_http_client_are_not_logged() -> None:
    output = io.StringIO()
    setup_logging("DEBUG", "json", stream=output)
    logging.getLogger("httpx").info("HTTP Request: POST https://x/?token=secret")
    logging.getLogger("httpcore.http11").debug("send_request_headers")
    assert output.getvalue() == ""


def test_every_line_of_a_process_says_whose_it_is() -> None:
    output = io.StringIO()
    setup_logging("INFO", "json", stream=output)
    identify(worker_id="worker_1")
    structlog.get_logger("x").info("one")
    logging.getLogger("celery").warning("two")
    assert [json.loads(line)["worker_id"] for line in output.getvalue().splitlines()] == [
        "worker_1"
    ] * 2


def test_a_long_chain_of_causes_is_cut() -> None:
    error: Exception = ValueError("first")
    for _ in range(50):
        after = RuntimeError("next")
        after.__cause__ = error
        error = after
    assert frames(error).count("RuntimeError") == 10
    assert frames(None) == ""
