"""Tenants take turns at what processes do for them: counted, not timed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Executable, Row, text

from shared.batches import repository as batches
from shared.db.session import AsyncDatabase
from shared.evaluations import grading
from shared.evaluations import repository as evaluations
from shared.evaluations.grader_requests import parse_graders
from shared.leases import Caretaker
from shared.webhooks import repository as webhooks
from tests.integration.conftest import Jobs

pytestmark = pytest.mark.integration


class Counting(Caretaker):
    """Claims as the real ones do; a row needs ten looks, each as long as the test says."""

    def __init__(self, database: AsyncDatabase, kind: str, repository: Any) -> None:
        self.kind = kind
        super().__init__(database, lease_seconds=60, wake=asyncio.Event())
        self._repository = repository
        self.served: list[str] = []
        self.most: dict[str, int] = {}

    def claim(self, holder: str, **turn: Any) -> Executable:
        statement: Executable = self._repository.claim(holder, 60.0, **turn)
        return statement

    def release(self, row_id: str, holder: str, *, for_seconds: float) -> Executable:
        statement: Executable = self._repository.release(row_id, holder, for_seconds=for_seconds)
        return statement

    async def see_to(self, row: Row[Any], holder: str) -> float:
        self.served.append(row.tenant)
        running = list(self._working.values()).count(row.tenant)
        self.most[row.tenant] = max(self.most.get(row.tenant, 0), running)
        await asyncio.sleep(0.01)
        return 0.0  # there is always more to do


EVALUATIONS = """
INSERT INTO evaluations (id, tenant, name, content_hash, dataset, endpoint, template, graders, items, window_seconds)
SELECT 'eval_' || tenant || n, tenant, 'n', tenant || n, '{}', '/v1/x', '"x"', '[]', 1, 60
"""
BATCHES = """
INSERT INTO batches (id, tenant, endpoint, input_file_id, completion_window, window_seconds, limits, request_hash, expires_at)
SELECT 'batch_' || tenant || n, tenant, '/v1/x', 'file', '24h', 60, '{}', 'h', now() + interval '1 day'
"""
OF_TENANTS = "FROM (SELECT 'busy' AS tenant, generate_series(1, 40) AS n UNION ALL SELECT 'b', 1 UNION ALL SELECT 'c', 1) t"


@pytest.mark.parametrize(
    "kind,rows,repository",
    [("evaluation", EVALUATIONS, evaluations), ("batch", BATCHES, batches)],
    ids=str,
)
async def test_one_tenant_with_much_to_do_does_not_hold_up_the_others(
    jobs: Jobs, kind: str, rows: str, repository: Any
) -> None:
    with jobs.database.write() as session:
        session.execute(text(rows + OF_TENANTS))
    database = AsyncDatabase(jobs.database_url)
    keeper = Counting(database, kind, repository)
    keeper.start()
    try:
        async with asyncio.timeout(120):
            while len(keeper.served) < 60:
                await asyncio.sleep(0.01)
    finally:
        await keeper.stop()
        await database.dispose()
    assert keeper.most["busy"] <= keeper.together - 1
    # Three tenants take turns: each has about a third, though one has forty rows and the others
    # one.
    for tenant in ("b", "c"):
        assert keeper.served.index(tenant) <= 4
        assert keeper.served[:60].count(tenant) >= 12


async def test_a_slice_grades_what_was_begun_and_leaves_the_rest() -> None:
    graders = parse_graders([{"type": "exact"}], code_allowed=False)
    result = {"choices": [{"text": "x"}]}
    empty = dict.fromkeys(
        ("error", "purged_at", "timing", "diffusion", "started_at", "finished_at")
    )
    rows: Any = [
        type(
            "Row",
            (),
            {
                "id": f"job_{n}",
                "batch_line": n,
                "number": n,
                "status": "succeeded",
                "result": result,
                "data": {"reference": "x"},
                "usage": {"completion_tokens": 1},
                **empty,
            },
        )
        for n in range(1, 101)
    ]

    async def graded(seconds: float) -> int:
        samples = await grading.grade_all(
            rows, graders, run_id="r", items=100, tenant="t", pool=None, seconds=seconds
        )
        return len(samples)

    assert 1 <= await graded(0.0) <= grading.TOGETHER
    assert await graded(60.0) == 100


def test_a_backlog_of_webhooks_of_one_tenant_hides_no_other(jobs: Jobs) -> None:
    """Thousands that are due earlier, to many receivers that are quick: the others' first is in the
    next round.
    """
    jobs.execute(
        text(
            "WITH made AS (INSERT INTO webhook_events (id, tenant, type, sequence) SELECT 'evt_' || t || n, t, 'x', 1 "
            "FROM (SELECT 'busy' AS t, generate_series(1, 6000) AS n UNION ALL SELECT 'b', 1 UNION ALL SELECT 'c', 1) s "
            "RETURNING id, tenant) INSERT INTO webhook_deliveries (event_id, tenant, url, next_attempt_at) "
            "SELECT id, tenant, 'https://' || id || '.example/', "
            "CASE tenant WHEN 'busy' THEN now() - interval '1 h' ELSE now() END FROM made RETURNING id"
        )
    )
    with jobs.database.write() as session:
        session.execute(text("ANALYZE webhook_deliveries"))
    taken = jobs.execute(
        webhooks.lease_due(lease_seconds=60, limit=8, per_receiver=2, per_tenant=100)
    )
    with jobs.database.read() as session:
        statement = text("SELECT tenant FROM webhook_deliveries WHERE id = ANY(:ids)")
        tenants = list(session.execute(statement, {"ids": [row.id for row in taken]}).scalars())
    assert len(tenants) == 8 and tenants.count("b") == 1 and tenants.count("c") == 1
