"""Lists read no column without a bound: PostgreSQL keeps those apart from the row, and a page of
them is megabytes.
"""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import ARRAY, LargeBinary, Select
from sqlalchemy.dialects.postgresql import JSONB

from shared.batches import repository as batches
from shared.evaluations import repository as evaluations
from shared.files import repository as files
from shared.jobs import listing, queries
from shared.webhooks import repository as webhooks

WANTED = listing.JobFilter("t")
LISTS: dict[str, Select[Any]] = {
    "jobs": listing.candidates(WANTED, 30),
    "jobs of a window": listing.of_window(WANTED, 30),
    "attempts": queries.attempts("job_1"),
    "batches": batches.list_batches("t", after=None, limit=30),
    "batch items": batches.items("batch_1", status=None, after_line=0, limit=30),
    "evaluations": evaluations.list_evaluations("t", after=None, limit=30),
    "evaluation items": evaluations.samples(
        "eval_1", configuration=None, outcome=None, after=None, limit=30
    ),
    "files": files.list_files("t", purpose=None, after=None, ascending=False, limit=30),
    "deliveries": webhooks.list_deliveries(
        "t", endpoint_id=None, job_id=None, status=None, before=None, limit=30
    ),
    "delivery attempts": webhooks.attempts_of([1]),
    "webhook endpoints": webhooks.list_endpoints("t", after=None, limit=30),
}
# What is bounded where it is written, by its number of parts and their lengths.
BOUNDED = {
    "metadata",
    "progress",
    "error",
    "errors",
    "usage",
    "timing",
    "diffusion",
    "webhook",
    "summary",
    "dataset",
    "seeds",
    "events",
    "filter",
    "metadata_filter",
    "limits",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_selects_nothing_without_a_bound(name: str) -> None:
    large = [
        column.name
        for column in LISTS[name].selected_columns
        if isinstance(column.type, JSONB | LargeBinary | ARRAY) and column.name not in BOUNDED
    ]
    assert large == []
    whole = {
        "result",
        "body",
        "params",
        "prompt_token_ids",
        "steps",
        "output",
        "verdicts",
        "data",
        "template",
        "graders",
    }
    assert whole.isdisjoint(column.name for column in LISTS[name].selected_columns)


def test_what_has_the_whole_selects_it() -> None:
    assert {"result", "params"} <= {
        column.name for column in queries.get("job_1", "t").selected_columns
    }
    assert "result" in {column.name for column in batches.item("batch_1", 1).selected_columns}
    whole = {column.name for column in evaluations.sample("eval_1", "a", 0, 0).selected_columns}
    assert {"output", "verdicts", "data"} <= whole
