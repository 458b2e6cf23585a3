"""Identifiers, queue names, model cards, log lines, errors, database URLs: small parts that
everything leans on.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.db.session import database_url
from shared.errors import ConfigurationError, VDiffError
from shared.ids import is_id, new_id
from shared.logging import setup_logging
from shared.model_card import ModelCard
from shared.queue.names import queue_name, queue_names


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1))
def test_ids_sort_by_time(first: int, second: int) -> None:
    a, b = new_id("job", now_ms=first), new_id("job", now_ms=second)
    if first != second:
        assert (a < b) == (first < second)
    assert is_id(a, "job")


def test_ids_are_told_from_other_text() -> None:
    assert len({new_id("job", now_ms=1) for _ in range(1000)}) == 1000
    for text in (
        "",
        "job",
        "job_",
        "job_x",
        new_id("req"),
        new_id("job") + "0",
        new_id("job").upper(),
        "job_" + "u" * 26,
    ):
        assert not is_id(text, "job")


def test_a_queue_per_model_and_priority() -> None:
    assert queue_name("org/model:tag", "bulk") == "vdiff.org%2Fmodel%3Atag.bulk"
    assert queue_names("m") == ["vdiff.m.interactive", "vdiff.m.normal", "vdiff.m.bulk"]
    with pytest.raises(ValueError, match="urgent"):
        queue_name("m", "urgent")


@given(st.text(min_size=1), st.text(min_size=1))
def test_two_models_never_share_a_queue(a: str, b: str) -> None:
    try:
        same = set(queue_names(a)) & set(queue_names(b))
    except UnicodeEncodeError:  # half a surrogate pair, which the API refuses
        return
    assert bool(same) == (a == b)


def test_a_model_card_survives_json() -> None:
    card = ModelCard(
        name="m",
        family="llada",
        context_length=8,
        vocab_size=9,
        mask_token_id=8,
        end_token_ids=(6, 7),
        suppress_token_ids={"logits": (6,)},
        capabilities={"algorithms": ["random"]},
        defaults={"temperature": 0.0},
    )
    stored = json.loads(json.dumps(card.to_json()))
    assert ModelCard.from_json(stored) == card
    # A worker of a newer version may know more; an older one less.
    assert ModelCard.from_json({**stored, "invented_later": 1}) == card
    del stored["device"], stored["defaults"]
    assert ModelCard.from_json(stored).device == "cpu"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_shows_no_values(
    output: io.StringIO, log_format: Literal["console", "json"]
) -> None:
    setup_logging("INFO", log_format, stream=output)
    prompt = "what nobody else " + "may read"
    try:
        raise ValueError(len(prompt))
    except ValueError:
        structlog.get_logger("ours").exception("broke")
    assert "ValueError" in output.getvalue()
    assert prompt not in output.getvalue()


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


def test_logs_of_all_libraries_are_one_format(output: io.StringIO) -> None:
    setup_logging("INFO", "json", stream=output)
    with structlog.contextvars.bound_contextvars(request_id="r"):
        structlog.get_logger("ours").info("job_done", job_id="j")
        logging.getLogger("theirs").warning("lost %s", "it")
        structlog.get_logger("ours").debug("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger("ours").exception("broke")
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["job_done", "lost it", "broke"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert [line["logger"] for line in lines] == ["ours", "theirs", "ours"]
    assert lines[0]["request_id"] == lines[1]["request_id"] == "r"
    assert lines[0]["job_id"] == "j"
    assert "ValueError" in lines[2]["exception"]
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_console_lines_have_no_colours_in_a_file(output: io.StringIO) -> None:
    setup_logging("WARNING", "console", stream=output)
    setup_logging(
        "WARNING", "console", stream=output
    )  # replaces the former, so each line comes once
    structlog.get_logger("ours").warning("odd", n=1)
    structlog.get_logger("ours").info("not shown")
    (line,) = output.getvalue().splitlines()
    assert "odd" in line
    assert "\x1b" not in line


def test_the_drawn_error_tree_is_the_real_one() -> None:
    drawn = errors.__doc__ or ""
    found = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, VDiffError) and c is not VDiffError
    ]
    assert len(found) > 15
    for kind in found:
        line = next((x for x in drawn.splitlines() if f"─ {kind.__name__} " in x), None)
        assert line is not None, f"{kind.__name__} is not drawn"
        if kind is not ConfigurationError:
            assert str(kind.http_status) in line.split()
            assert ("retryable" in line) == kind.retryable, kind.__name__


@pytest.mark.parametrize(
    "url", ["postgresql://u:p@h/d", "postgres://u:p@h/d", "postgresql+psycopg2://u:p@h/d"]
)
def test_a_database_url_gets_our_driver(url: str) -> None:
    made = database_url(url, driver="psycopg")
    assert made.render_as_string(hide_password=False) == "postgresql+psycopg://u:p@h/d"


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://h/d", "postgresql://h:port/d", "postgresql://h/d?sslmod=x"]
)
def test_what_is_no_database_url_is_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match="VDIFF_DATABASE_URL"):
        database_url(url, driver="psycopg")
