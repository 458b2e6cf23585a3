"""Fill a ledger with millions of jobs and print plans and times of the lists, the counts and the
retention.

    python benchmarks/ledger.py --database-url postgresql://... --rows 10000000

The database must be migrated, and is filled with rows of one large tenant and a hundred small ones.
`docs/benchmarks/ledger.md` has what it printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from shared import counts
from shared.db.explain import explain as explained
from shared.db.lists import ListsDatabase
from shared.db.session import Database
from shared.jobs import caretaking, listing
from shared.jobs.listing import JobFilter, read_page
from shared.webhooks import repository as webhooks

TENANT = "large"
CHUNK = 250_000
TRIES = 5
# Three months of jobs: one in a thousand failed, twenty models of which the last is rare, labels
# that are common or unique.
FILL = """
INSERT INTO jobs (id, tenant, endpoint, model, status, metadata, body, params, prompt_token_ids, created_at, queued_at,
                  finished_at, result, error, usage, retain_seconds, purge_after)
SELECT 'job_' || ms || lpad(n::text, 16, '0'),
       CASE WHEN n % 20 = 0 THEN 'small-' || (n / 20 % 100) ELSE 'large' END, '/v1/chat/completions',
       CASE WHEN n % 100000 = 7 THEN 'model-rare' ELSE 'model-' || (n % 19) END, status,
       jsonb_build_object('env', CASE WHEN n % 3 = 0 THEN 'dev' ELSE 'prod' END, 'order', n::text),
       CAST(:body AS jsonb), '{}', CAST(:prompt AS integer[]), at, at, at + interval '3 s',
       CASE WHEN status = 'succeeded' THEN CAST(:body AS jsonb) END,
       CASE WHEN status = 'failed' THEN '{"code": "x", "message": "x"}'::jsonb END,
       '{"prompt_tokens": 50, "completion_tokens": 60}', 3600, at + interval '1 h'
FROM (
    SELECT n, at, CASE WHEN n % 1000 = 3 THEN 'failed' ELSE 'succeeded' END AS status, {digits} AS ms
    FROM (SELECT n, at, (extract(epoch FROM at) * 1000)::bigint AS ms FROM (
        SELECT n, now() - interval '90 d' * (1 - n::float8 / :rows) AS at
        FROM generate_series(CAST(:first AS bigint), :last) AS n) AS dated) AS timed
) AS made
"""
DIGITS = " || ".join(
    f"substr('0123456789abcdefghjkmnpqrstvwxyz', 1 + ((ms >> {5 * i}) & 31)::int, 1)"
    for i in range(9, -1, -1)
)
BODY = json.dumps({"messages": [{"role": "user", "content": "x" * 250}]})
COUNT = """
INSERT INTO count_deltas (kind, tenant, status, amount) SELECT 'job', tenant, status, count(*) FROM jobs GROUP BY 2, 3
"""
INDEXES = (
    "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'jobs' AND indexname <> 'pk_jobs'"
)


def fill(database: Database, rows: int) -> None:
    began = time.monotonic()
    engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # indexes are built faster at once than row by row
        built = [row.indexdef for row in connection.execute(text(INDEXES))]
        for row in connection.execute(text(INDEXES)).all():
            connection.execute(text(f"DROP INDEX {row.indexname}"))
    for first in range(1, rows + 1, CHUNK):
        with database.write() as session:
            session.execute(text("SET LOCAL statement_timeout = 0"))
            session.execute(text("SET LOCAL synchronous_commit = off"))
            session.execute(
                text("SET LOCAL session_replication_role = replica")
            )  # no triggers; COUNT does their work
            values = {
                "first": first,
                "last": min(first + CHUNK - 1, rows),
                "rows": rows,
                "body": BODY,
            }
            prompt = "{" + ",".join(map(str, range(50))) + "}"
            session.execute(text(FILL.replace("{digits}", DIGITS)), {**values, "prompt": prompt})
        print(f"{first + CHUNK - 1:>10} rows after {time.monotonic() - began:.0f} s", flush=True)
    with engine.connect() as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("SET maintenance_work_mem = '1GB'"))
        for definition in built:
            connection.execute(text(definition))
            print(
                f"{definition.split(' ON ')[0]} after {time.monotonic() - began:.0f} s", flush=True
            )
        connection.execute(text("VACUUM (ANALYZE) jobs"))
        connection.execute(text(COUNT))
        connection.execute(counts.roll_up())
    print(f"filled after {time.monotonic() - began:.0f} s", flush=True)


def explain(database: Database, name: str, statement: Any) -> None:
    """Print the plan, with what it read."""
    with database.write() as session:
        lines = explained(session, statement, "ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY ON")
        print(f"\n## {name}\n" + "\n".join(line[:160] for line in lines), flush=True)


def timed(name: str, run: Callable[[], Any]) -> None:
    seconds = []
    for _ in range(TRIES):
        began = time.monotonic()
        found = run()
        seconds.append(time.monotonic() - began)
    first, median = 1000 * seconds[0], 1000 * statistics.median(seconds)
    print(f"| {name} | {first:.1f} | {median:.1f} | {found} |", flush=True)


def lists(url: str) -> None:
    now = datetime.now(UTC)
    database = ListsDatabase(url)
    cases: dict[str, dict[str, Any]] = {
        "no filter": {},
        "status (rare)": {"status": "failed"},
        "status (common)": {"status": "succeeded"},
        "model (rare)": {"model": "model-rare"},
        "model (common)": {"model": "model-1"},
        "model that does not exist": {"model": "none"},
        "status and model": {"status": "failed", "model": "model-3"},
        "created_after an hour ago": {"created_after": now - timedelta(hours=1)},
        "created_after in the future": {"created_after": now + timedelta(days=1)},
        "metadata (unique)": {"metadata": {"order": "4444444"}},
        "metadata (common)": {"metadata": {"env": "prod"}},
        "metadata that does not exist": {"metadata": {"env": "none"}},
        "status and metadata": {"status": "failed", "metadata": {"env": "dev"}},
        "model, status, metadata, time": {
            "model": "model-3",
            "status": "failed",
            "metadata": {"env": "prod"},
            "created_after": now - timedelta(days=30),
        },
    }
    with asyncio.Runner() as runner:

        def page(wanted: JobFilter) -> str:
            found = runner.run(read_page(database, wanted, 20))
            return f"{len(found.rows)} rows{'' if found.next_id is None else ', more'}"

        print("\n| list | first, ms | median, ms | page |\n|---|---|---|---|")
        for name, given in cases.items():
            timed(name, lambda given=given: page(JobFilter(TENANT, **given)))
        runner.run(database.dispose())


def plans(database: Database) -> None:
    for name, wanted in (
        ("model", JobFilter(TENANT, model="model-1")),
        ("status and model", JobFilter(TENANT, status="failed", model="model-3")),
        ("created_after", JobFilter(TENANT, created_after=datetime.now(UTC) - timedelta(hours=1))),
        ("status and metadata", JobFilter(TENANT, status="failed", metadata={"env": "dev"})),
    ):
        explain(database, name, listing.of_window(wanted, 21))
    explain(
        database,
        "metadata, unique",
        listing.of_rare_metadata(JobFilter(TENANT, metadata={"order": "4444444"}), 21),
    )
    explain(database, "jobs by state, for /metrics", counts.jobs_by_status())
    explain(database, "jobs by state, of one tenant", counts.jobs_by_status(TENANT))
    statement = webhooks.list_deliveries(
        TENANT, endpoint_id=None, job_id=None, status="failed", before=None, limit=20
    )
    explain(database, "webhook deliveries that failed", statement)


def retention(database: Database, seconds: float) -> None:
    """Remove what is due, chunk after chunk, and print the rate."""
    for name, statement in (
        ("purged", caretaking.purge_due()),
        ("forgotten", caretaking.delete_old(older_than_seconds=3600)),
    ):
        began, done = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            with database.write() as session:
                found = len(session.execute(statement).all())
            done += found
            if not found:
                break
        print(
            f"{name}: {done / (time.monotonic() - began):.0f} rows per second ({done} rows)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database-url", required=True)
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="jobs to add; 0 measures what is there"
    )
    parser.add_argument(
        "--retention-seconds", type=float, default=20.0, help="how long each removal runs"
    )
    given = parser.parse_args()
    database = Database(given.database_url)
    if given.rows:
        fill(database, given.rows)
    plans(database)
    lists(given.database_url)
    retention(database, given.retention_seconds)
    database.dispose()


if __name__ == "__main__":
    main()
