"""Costs of submitting, dispatching and claiming with few and with very many jobs waiting, and the
plans.

    python benchmarks/dispatch.py [--depths 1000,1000000] [--output docs/benchmarks/dispatch.md]

On an embedded PostgreSQL of its own (synchronous_commit on), with the statements that API and
workers use.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import text
from sqlalchemy.dialects import postgresql

from migrations.run import upgrade
from shared.db.session import Database
from shared.ids import new_id
from shared.jobs import lanes, queries, repository
from vdiff.embedded import EmbeddedPostgres

MODEL, TENANTS, REPEATS, WINDOW = "m", 50, 200, 8

FILL = """
INSERT INTO jobs (id, tenant, endpoint, model, priority, body, params, prompt_token_ids, tokens, queued_at)
SELECT 'job_' || lpad(i::text, 26, '0'), 'tenant-' || i % CAST(:tenants AS int), '/v1/completions', 'm', 'bulk',
       '{"model": "m", "prompt": "x"}', '{"max_tokens": 64, "n": 1}', '{1,2,3,4,5,6,7,8}', 72,
       now() - (CAST(:count AS int) - i) * interval '1 ms'
FROM generate_series(CAST(:start AS int), CAST(:stop AS int)) AS i
"""


def milliseconds(action: Callable[[int], object]) -> tuple[float, float]:
    """p50 and p95."""
    taken = []
    for i in range(REPEATS):
        began = time.perf_counter()
        action(i)
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken), statistics.quantiles(taken, n=20)[18]


def measure(database: Database) -> dict[str, tuple[float, float]]:
    def values(job_id: str) -> dict[str, object]:
        return {
            "id": job_id,
            "tenant": "tenant-7",
            "endpoint": "/v1/completions",
            "model": MODEL,
            "priority": "bulk",
            "key_id": "",
            "body": {"prompt": "x"},
            "params": {"max_tokens": 64},
            "prompt_token_ids": [1] * 8,
            "tokens": 72,
        }

    def submit(i: int) -> None:
        with database.write() as session:
            session.execute(queries.insert_job(values(new_id("job"))))

    def dispatch(i: int) -> None:
        with database.write() as session:
            session.execute(lanes.lock_queue(MODEL, "bulk")).scalar_one()
            session.execute(lanes.roll_up())
            found = session.execute(
                lanes.candidates(MODEL, "bulk", clock=0.0, lanes=2 * WINDOW, per_lane=WINDOW // 2)
            ).all()
            taken.extend(
                row.id
                for row in session.execute(lanes.take([row.id for row in found[: WINDOW // 2]]))
            )

    def claim(i: int) -> None:
        with database.write() as session:
            session.execute(repository.claim(taken.pop(), worker_id="w", lease_seconds=3600)).one()

    def depth(i: int) -> None:
        with database.read() as session:
            session.execute(lanes.queued_of("tenant-7", "")).one()

    taken: list[str] = []
    with database.write() as session:
        session.execute(lanes.ensure_queue(MODEL, "bulk"))
    return {
        "submit (INSERT, COMMIT)": milliseconds(submit),
        "a dispatcher's round, 4 jobs": milliseconds(dispatch),
        "claim (UPDATE, INSERT, COMMIT)": milliseconds(claim),
        "a tenant's queued jobs and tokens": milliseconds(depth),
    }


def plans(database: Database) -> dict[str, str]:
    statements = {
        "the candidates of a round": lanes.candidates(
            MODEL, "bulk", clock=0.0, lanes=2 * WINDOW, per_lane=WINDOW // 2
        ),
        "what a tenant has queued": lanes.queued_of("tenant-7", ""),
    }
    shown = {}
    with database.read() as session:
        job_id = session.execute(
            text("SELECT id FROM jobs WHERE status = 'queued' LIMIT 1")
        ).scalar_one()
        statements["a claim (rolled back)"] = repository.claim(
            job_id, worker_id="w", lease_seconds=1
        )
    for name, statement in statements.items():
        sql = str(
            statement.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})
        )
        with database.engine.connect() as connection:
            lines = connection.exec_driver_sql(
                "EXPLAIN (ANALYZE, COSTS OFF, BUFFERS OFF) " + sql.replace("%", "%%")
            ).all()
            connection.rollback()
        shown[name] = "\n".join(line[0] for line in lines)
    return shown


def run(counts: list[int]) -> str:
    results, shown = {}, {}
    for count in counts:
        with TemporaryDirectory(prefix="vdiff-bench-", ignore_cleanup_errors=True) as folder:
            Path(folder).chmod(0o755)
            server = EmbeddedPostgres(Path(folder))
            try:
                url = server.start()
                upgrade(url)
                database = Database(url, pool_size=2)
                for start in range(1, count + 1, 50_000):
                    with database.write() as session:
                        stop = min(start + 49_999, count)
                        session.execute(
                            text(FILL),
                            {"tenants": TENANTS, "count": count, "start": start, "stop": stop},
                        )
                with database.engine.execution_options(
                    isolation_level="AUTOCOMMIT"
                ).connect() as connection:
                    connection.exec_driver_sql("VACUUM ANALYZE")
                results[count] = measure(database)
                shown = plans(database)
                database.dispose()
            finally:
                server.stop()
    return report(results, shown)


def report(results: dict[int, dict[str, tuple[float, float]]], shown: dict[str, str]) -> str:
    counts = list(results)
    lines = [
        "# Submitting, dispatching and claiming, by the length of the queue",
        "",
        f"`python benchmarks/dispatch.py --depths {','.join(str(c) for c in counts)}` on {platform.machine()}, "
        f"an embedded PostgreSQL 18 (synchronous_commit on), {TENANTS} tenants, {REPEATS} repetitions; "
        "p50 / p95 in milliseconds.",
        "",
        "| waiting jobs | " + " | ".join(f"{c:,}" for c in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for name in results[counts[0]]:
        cells = " | ".join(f"{results[c][name][0]:.2f} / {results[c][name][1]:.2f}" for c in counts)
        lines.append(f"| {name} | {cells} |")
    lines += ["", f"## Plans with {counts[-1]:,} jobs waiting", ""]
    for name, plan in shown.items():
        lines += [f"{name[0].upper()}{name[1:]}:", "", "```", plan, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="1000,1000000", help="queue lengths")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    text_ = run([int(c) for c in options.depths.split(",")])
    if options.output is None:
        print(text_)
    else:
        options.output.write_text(text_)


if __name__ == "__main__":
    main()
