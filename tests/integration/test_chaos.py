"""The short form of the chaos suite: real processes, some of each fault, no violation. The long
form is `make chaos`.
"""

from __future__ import annotations

import pytest

from tests.chaos.run import Options, run

pytestmark = pytest.mark.integration
KINDS = (
    "kill -9 worker",
    "kill -9 API",
    "FLUSHALL",
    "connections cut",
    "messages twice",
    "receiver fails",
    "kill -9 PostgreSQL",
)


def test_nothing_is_lost_and_nothing_comes_twice() -> None:
    report = run(Options(jobs=80, faults=5, seed=4, concurrency=16, kinds=KINDS))
    assert report.violations == [], report.command
    assert sum(report.faults.values()) == 5
    assert report.jobs["succeeded"] > 20 and report.webhooks["requests"] > 0
