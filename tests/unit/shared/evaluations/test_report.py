"""Reports of made-up samples: what stands in them, that text stays text, and that a page needs
nothing from anywhere.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from api.routes.evaluations import accepted
from shared.evaluations import report as reports
from shared.evaluations import results, views
from shared.plots import Point, curves, log_ticks, nice_ticks, scatter

EVIL = "<script>alert('x')</script> | **b** \"q\" & `c` ]]>"
BEGAN = datetime(2026, 11, 25, 12, tzinfo=UTC)
Sample = namedtuple(
    "Sample",
    "item repeat outcome key cluster completion_tokens forwards latency_ms queued_ms device_ms started_at finished_at",
)


class Row(dict[str, Any]):
    """A row as the database gives it: by attribute, and by name."""

    __getattr__ = dict.__getitem__

    @property
    def _mapping(self) -> Row:
        return self


def samples(passed: int, *, forwards: int, total: int = 40, errors: int = 1) -> list[Sample]:
    made = []
    for i in range(total):
        outcome = "error" if i >= total - errors else "passed" if i < passed else "failed"
        answered = outcome != "error"
        end = BEGAN + timedelta(seconds=i)
        made.append(
            Sample(
                i + 1,
                0,
                outcome,
                f"k{i}",
                f"k{i}",
                8 if answered else None,
                forwards,
                50.0 + i,
                5.0,
                20.0,
                BEGAN,
                end,
            )
        )
    return made


def report(name: str = EVIL) -> dict[str, Any]:
    numbers = {name: samples(30, forwards=8), "fast": samples(28, forwards=2)}
    configurations = []
    for i, (label, rows) in enumerate(numbers.items()):
        run = Row(
            name=label,
            id=f"evalrun_{i}",
            status="completed",
            model="m",
            revision="r1",
            fields={"stop": [EVIL]},
            seeds=[0],
            error=None,
            total=40,
            stored=40,
            created_at=BEGAN,
            expires_at=BEGAN,
            finished_at=BEGAN,
        )
        made = results.results_of(rows)
        counts = {**dict.fromkeys(views.OUTCOMES, 0), **made["outcomes"]}
        errors = [{"code": "grader_timeout", "count": 1, "message": EVIL}]
        jobs = {"queued": 0, "running": 0}
        configurations.append(
            views.configuration_object(run, counts, jobs, made, errors, served=True)
        )
    row = Row(
        id="eval_1",
        name=EVIL,
        status="completed",
        created_at=BEGAN,
        finished_at=BEGAN,
        dataset={"file_id": "file-1"},
        items=40,
        metadata={},
        endpoint="/v1/chat/completions",
        template=EVIL,
        graders=[{"type": "exact"}],
        content_hash="h",
    )
    item = {
        "configuration": name,
        "item": 31,
        "line": 31,
        "repeat": 0,
        "outcome": "failed",
        "error": None,
        "job_id": "job_1",
        "data": {"input": EVIL, "reference": EVIL},
        "output": EVIL,
        "graders": [{"name": "exact", "passed": False, "extracted": EVIL}],
    }
    first, second = numbers.values()
    return {
        "evaluation": views.evaluation_object(row, configurations),
        "comparisons": [
            {
                "first_name": name,
                "second_name": "fast",
                **results.compare(first, second, resamples=500),
            }
        ],
        "latency_curves": {label: results.latency_curve(rows) for label, rows in numbers.items()},
        "not_passed": [item],
    }


def test_results_by_hand() -> None:
    made = results.results_of(samples(30, forwards=8))
    assert made["outcomes"] == {"error": 1, "failed": 9, "passed": 30}
    assert (made["accuracy"]["items"], made["accuracy"]["mean"]) == (
        39,
        pytest.approx(30 / 39, rel=1e-5),
    )
    assert (made["completion_tokens"], made["forwards"]) == (39 * 8, 39 * 8)
    assert (made["tokens_per_forward"], made["device_seconds"]) == (1.0, 0.78)
    assert (made["latency_ms"]["p50"], made["wall_seconds"]) == (69.0, 38.0)
    assert made["tokens_per_second"] == pytest.approx(8000 / 69, rel=1e-5)
    assert made["throughput_tokens_per_second"] == pytest.approx(39 * 8 / 38, rel=1e-5)
    nothing = results.results_of(samples(0, forwards=1, errors=40))
    assert (nothing["accuracy"], nothing["latency_ms"]["p50"], nothing["tokens_per_second"]) == (
        None,
        None,
        None,
    )
    with pytest.raises(results.NothingToCompare):
        results.compare(samples(0, forwards=1, errors=40), samples(3, forwards=1))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_it_all_and_runs_nothing() -> None:
    made = reports.page(report())
    page = Page()
    page.feed(made)
    assert not {"script", "link", "img", "iframe", "object", "b"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "style"} & attributes.keys() and not [
            a for a in attributes if a.startswith("on")
        ]
    addresses = re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", made)
    assert "http:" not in addresses and "https:" not in addresses and "url(" not in addresses
    assert (
        page.text.count(EVIL) >= 6
    )  # the name, the template, the configuration, the item: read as text
    for words in (
        "76.9%",
        "61.7% to 87.4%",
        "1 times grader_timeout",
        "Compared with",
        "Item 31, line 31",
        "-5.1",
    ):
        assert words in page.text, words
    assert [tag for tag, _ in page.tags].count("svg") == 2
    assert "prefers-color-scheme: dark" in made


def test_markdown_keeps_its_tables_whatever_the_texts() -> None:
    made = reports.markdown(report())
    lines = made.splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    assert len(tables) == 4 + 3 + 3
    columns = {len(re.split(r"(?<!\\)\|", line)) - 2 for line in tables}
    assert columns == {12, 7, 6}
    assert "<script" not in made and "&lt;script&gt;" in made
    assert "76.9%" in made and "-5.1" in made


def test_plots_are_whole_and_their_texts_are_text() -> None:
    many = [Point(f"{EVIL} {i}", f"{EVIL} {i}", i / 3, 0.5, 0.4, 0.6) for i in range(25)]
    plot = ET.fromstring(scatter(many, x_label="x", y_label="y", alone=True))
    lines = {name: [(1.0, 0.0), (20.0, 1.0)] for name in ("a", EVIL)}
    curve = ET.fromstring(curves(lines, x_label="x", y_label="y"))
    space = "{http://www.w3.org/2000/svg}"
    assert len(plot.findall(f"{space}circle")) + len(plot.findall(f"{space}rect")) == 2 * 25
    assert len(curve.findall(f"{space}polyline")) == 2
    height = float(plot.attrib["viewBox"].split()[3])
    assert all(
        float(text.attrib["y"]) <= height for text in plot.findall(f"{space}text")
    )  # the legend has room
    assert ET.fromstring(scatter([], x_label="x", y_label="y")) is not None
    assert (
        ET.fromstring(curves({"a": [(5.0, 0.0), (5.0, 1.0)]}, x_label="x", y_label="y")) is not None
    )


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 9.7) == [0, 2, 4, 6, 8]
    assert nice_ticks(0.61, 1) == [0.7, 0.8, 0.9, 1.0]
    assert nice_ticks(3, 3) == [3]
    assert log_ticks(3, 120) == [5, 10, 20, 50, 100]


@pytest.mark.parametrize(
    "header,format",
    [
        ("", "json"),
        ("*/*", "json"),
        ("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", "html"),
        ("text/markdown", "markdown"),
        ("application/json, text/html;q=0.5", "json"),
        ("text/html;q=0.3, text/markdown;q=0.7", "markdown"),
        ("text/html;q=x", "json"),
        ("TEXT/HTML", "html"),
    ],
)
def test_accept(header: str, format: str) -> None:
    assert accepted(header) == format
