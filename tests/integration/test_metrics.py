"""Every metric is seen to move under real work; one that never moves would be a decoration."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import openai
import pytest
from sqlalchemy import text

from shared.jobs import repository
from shared.jobs.status import JobStatus
from tests.integration import test_evaluations as evaluations
from tests.integration.conftest import Served, eventually, metric
from tests.integration.test_api_jobs import chat_job, database_away, long_job
from tests.integration.test_batches import long_line, over, start

pytestmark = pytest.mark.integration
MODEL = {"model": "vdiff-tiny"}
Read = Callable[[], float]
# Seen to move by other tests: test_backpressure.py, test_webhooks.py, test_redis_outages.py,
# test_followers.py and test_maintenance.py; and those of the engine, as a worker takes no more jobs
# than it has slots, and the bundled model's prompts are never stored in parts.
MOVED: set[str] = {
    "vdiff_requests_waiting",
    "vdiff_webhook_attempts_total",
    "vdiff_webhook_attempt_seconds",
    "vdiff_webhook_deliveries_pending",
    "vdiff_webhook_late_seconds",
    "vdiff_webhook_endpoints",
    "vdiff_webhook_endpoints_disabled_total",
    "vdiff_api_duty_failures_total",
    "vdiff_worker_duty_failures_total",
    "vdiff_sender_duty_failures_total",
    "vdiff_worker_consumer_restarts_total",
    "vdiff_sender_consumer_restarts_total",
    "vdiff_worker_messages_dropped_total",
    "vdiff_sender_messages_dropped_total",
    "vdiff_followers",
    "vdiff_lease_overdue_seconds",
    "vdiff_engine_preemptions_total",
    "vdiff_engine_prefill_forwards_total",
}


def reader(served: Served, name: str, **labels: str) -> Read:
    MOVED.add(re.sub("_(count|sum|bucket)$", "", name))

    def read() -> float:
        return metric(served, name, **labels)

    read.__name__ = f"{name} {labels}"
    return read


def all_rise(reads: list[Read], before: list[float]) -> None:
    """Wait for each, so that a failure names the one that stays."""
    for read, old in zip(reads, before, strict=True):
        eventually(lambda read=read, old=old: read() > old, what=read.__name__)  # type: ignore[misc]


def test_a_job_moves_the_counters(served: Served) -> None:
    reads = [
        reader(served, "vdiff_requests_total", route="/v1/jobs", status="200"),
        reader(served, "vdiff_request_latency_seconds_count", route="/v1/jobs"),
        reader(served, "vdiff_request_latency_seconds_sum", route="/v1/jobs"),
        reader(served, "vdiff_errors_total", code="job_not_found"),
        reader(served, "vdiff_jobs", status="succeeded"),
        reader(served, "vdiff_tokens_generated_total", **MODEL),
        reader(served, "vdiff_prompt_tokens_total", **MODEL),
        reader(served, "vdiff_engine_steps_total", **MODEL),
        reader(served, "vdiff_engine_forwards_total", **MODEL),
        reader(served, "vdiff_engine_sequence_steps_total", **MODEL),
        reader(served, "vdiff_engine_step_seconds_total", **MODEL),
        reader(served, "vdiff_engine_sequences_per_step_count", **MODEL),
        reader(served, "vdiff_engine_sequences_per_step_sum", **MODEL),
        reader(served, "vdiff_tokens_committed_total", **MODEL),
        reader(served, "vdiff_attempts_total", **MODEL, outcome="succeeded"),
        reader(served, "vdiff_job_queue_seconds_count", **MODEL, priority="normal"),
        reader(served, "vdiff_job_run_seconds_sum", **MODEL, algorithm="low_confidence"),
        reader(served, "vdiff_job_tokens_per_forward_count", **MODEL, algorithm="low_confidence"),
    ]
    before = [read() for read in reads]
    served.client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"})
    served.client.get("/v1/jobs/job_none")
    all_rise(reads, before)


def test_a_batch_moves_its_gauges(served: Served) -> None:
    reads = [
        reader(served, "vdiff_batches", status="completed"),
        reader(served, "vdiff_files", purpose="batch"),
        reader(served, "vdiff_file_bytes", purpose="batch"),
        reader(served, "vdiff_file_bytes", purpose="batch_output"),
    ]
    before = [read() for read in reads]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused") as client:
        batch = start(client, [long_line(f"l-{i}", tokens=200) for i in range(4)])

        def open_lines() -> float:
            found = re.search(
                r"^vdiff_batch_lines_open (\S+)$", served.client.get("/metrics").text, re.MULTILINE
            )
            return float(found.group(1)) if found else 0.0

        MOVED.add("vdiff_batch_lines_open")
        eventually(lambda: open_lines() >= 1, what="open lines")
        assert over(client, batch.id).status == "completed"
        all_rise(reads, before)
        eventually(lambda: open_lines() == 0, what="no open line")


def test_apd_and_caches_move_theirs(served: Served) -> None:
    reads = [
        reader(served, "vdiff_apd_drafted_total", **MODEL),
        reader(served, "vdiff_apd_accepted_total", **MODEL),
        reader(served, "vdiff_apd_verifier_seconds_total", **MODEL),
        reader(served, "vdiff_engine_cache_refreshes_total", **MODEL),
    ]
    before = [read() for read in reads]
    for diffusion in ({"algorithm": "apd"}, {"cache": "prefix"}):
        job = chat_job(body={"max_tokens": 32, "diffusion": diffusion})
        assert (
            served.client.post("/v1/jobs", json=job, headers={"prefer": "wait=30"}).status_code
            == 200
        )
    all_rise(reads, before)


def test_workers_of_long_ago_are_one_row_and_still_count(served: Served) -> None:
    generated = reader(served, "vdiff_tokens_generated_total", **MODEL)
    eventually(lambda: metric(served, "vdiff_jobs_running", **MODEL) == 0, what="rest")
    before = generated()
    old = (
        "INSERT INTO workers (id, model, hostname, pid, device, slots, version, state, stats, last_beat_at)"
        " SELECT 'worker_old_' || i, 'vdiff-tiny', 'h', 1, 'cpu', 1, '0', 'stopped', '{\"tokens_generated\": 7}',"
        " now() - interval '8 days' FROM generate_series(1, 5) AS i RETURNING id"
    )
    served.jobs.execute(text(old))

    def rows() -> int:
        return len(served.jobs.execute(text("SELECT id FROM workers WHERE id LIKE 'worker_old_%'")))

    eventually(lambda: rows() == 1, what="one row of five")
    assert generated() == before + 35


def test_the_memory_of_caches_is_shown(served: Served) -> None:
    held = reader(served, "vdiff_engine_cache_tokens", **MODEL)
    job = long_job()
    job["body"]["diffusion"] = {"block_length": 32, "cache": "dual"}
    made = served.client.post("/v1/jobs", json=job).json()
    eventually(lambda: held() > 0, what="tokens in caches")
    served.client.post(made["urls"]["cancel"])
    eventually(lambda: held() == 0, what="none left")


def test_tokens_are_counted_exactly(served: Served) -> None:
    generated = reader(served, "vdiff_tokens_generated_total", **MODEL)
    eventually(lambda: metric(served, "vdiff_jobs_running", **MODEL) == 0, what="rest")
    before = generated()
    job = served.client.post("/v1/jobs", json=chat_job(), headers={"prefer": "wait=30"}).json()
    eventually(
        lambda: generated() == before + job["usage"]["completion_tokens"], what="exactly its tokens"
    )


def test_what_lives_runs_and_waits(served: Served) -> None:
    assert reader(served, "vdiff_workers", **MODEL)() == 1
    assert reader(served, "vdiff_slots", **MODEL)() == 4
    running = reader(served, "vdiff_jobs_running", **MODEL)
    depth = reader(served, "vdiff_queue_depth", **MODEL, priority="bulk")
    oldest = reader(served, "vdiff_queue_oldest_seconds", **MODEL, priority="bulk")
    jobs = [
        served.client.post("/v1/jobs", json=long_job(priority="bulk")).json() for _ in range(12)
    ]
    eventually(lambda: running() > 0 and depth() > 0, what="running and queued")
    first = oldest()
    eventually(lambda: oldest() > first or depth() == 0, what="growing older")
    assert oldest() > 0
    for job in reversed(jobs):
        served.client.post(job["urls"]["cancel"])
    eventually(lambda: running() == depth() == 0, what="none left")


def until(read: Read, act: Callable[[], None]) -> None:
    """Do it again until the number rises: a heartbeat may be quicker than what a test provokes."""
    before = read()
    for _ in range(20):
        act()
        if read() > before:
            return
    eventually(lambda: read() > before, what="a higher count")


def run_and(served: Served, meanwhile: Callable[[str], None], max_tokens: int = 64) -> None:
    """A job that something happens to while it runs; it succeeds nevertheless."""
    job_id = served.jobs.submit(max_tokens=max_tokens, ignore_eos=True)
    served.jobs.wait_status(job_id, JobStatus.RUNNING)
    meanwhile(job_id)
    assert served.jobs.wait_done(job_id, seconds=60).status == JobStatus.SUCCEEDED


def test_leases_that_expire_are_counted(served: Served) -> None:
    past = "UPDATE jobs SET lease_until = now() - interval '1 s' WHERE id = :id AND status = 'running' RETURNING id"

    def expire(job_id: str) -> None:
        served.jobs.execute(text(past).bindparams(id=job_id))
        eventually(
            lambda: served.jobs.outcomes(job_id)[0] != "running",
            what="the end of the first attempt",
        )

    until(
        reader(served, "vdiff_sweeper_actions_total", action="leases_expired"),
        lambda: run_and(served, expire),
    )


def test_ends_that_come_too_late_are_counted(served: Served) -> None:
    """A short job ends before its worker's next heartbeat could tell it that it was taken away; how
    short is short enough depends on the machine.
    """
    lengths = itertools.cycle((64, 32, 16, 8))

    def take_away(job_id: str) -> None:
        served.jobs.execute(repository.drain([(job_id, 1)]))

    until(
        reader(served, "vdiff_ends_fenced_total", **MODEL),
        lambda: run_and(served, take_away, next(lengths)),
    )


def test_lost_messages_are_counted(served: Served) -> None:
    """Redis forgets messages of jobs that wait: the worker's slots are taken, so that these stay in
    their list.
    """
    pushed = reader(served, "vdiff_sweeper_actions_total", action="messages_pushed_again")
    before = pushed()
    jobs = [served.client.post("/v1/jobs", json=long_job(priority="bulk")).json() for _ in range(6)]
    eventually(
        lambda: served.jobs.redis.llen("vdiff.vdiff-tiny.bulk") > 0, what="a message that waits"
    )
    served.jobs.redis.delete("vdiff.vdiff-tiny.bulk")
    eventually(lambda: pushed() > before, seconds=40, what="pushed again")
    for job in reversed(jobs):
        served.client.post(job["urls"]["cancel"])


def test_attempts_that_go_back_are_counted(served: Served) -> None:
    requeued = reader(served, "vdiff_jobs_requeued_total", **MODEL)
    before = requeued()
    jobs = served.jobs
    job_id = jobs.submit(push=0, max_attempts=2)
    # As if a version that knew more had accepted it: the engine's side fails, which may pass, so it
    # goes back once.
    jobs.execute(
        text(
            "UPDATE jobs SET params = CAST(params AS jsonb) || '{\"x\": 1}' WHERE id = :id RETURNING id"
        ).bindparams(id=job_id)
    )
    row = jobs.wait_done(job_id, seconds=60)
    assert (row.status, row.failures, row.error["retryable"]) == ("failed", 2, True)
    eventually(lambda: requeued() == before + 1, what="one that went back")


def test_suspects_are_counted(served: Served) -> None:
    suspects = reader(served, "vdiff_suspects", model="nobody")
    job_id = served.jobs.submit(push=0)
    served.jobs.execute(
        text(
            "UPDATE jobs SET model = 'nobody', isolation = 1 WHERE id = :id RETURNING id"
        ).bindparams(id=job_id)
    )
    assert suspects() == 1
    served.jobs.execute(repository.request_cancel(job_id))
    assert suspects() == 0


def test_deadlines_and_retention_are_counted(served: Served) -> None:
    passed = reader(served, "vdiff_sweeper_actions_total", action="deadlines_passed")
    purged = reader(served, "vdiff_sweeper_actions_total", action="jobs_purged")
    before = [passed(), purged()]
    jobs = served.jobs
    late = jobs.submit(push=0)
    jobs.execute(
        text(
            "UPDATE jobs SET start_by = now() - interval '1 h' WHERE id = :id RETURNING id"
        ).bindparams(id=late)
    )
    old = jobs.submit()
    jobs.wait_done(old)
    jobs.execute(
        text("UPDATE jobs SET purge_after = now() WHERE id = :id RETURNING id").bindparams(id=old)
    )
    assert jobs.wait_done(late).status == JobStatus.EXPIRED
    eventually(lambda: passed() > before[0] and purged() > before[1], what="counts")


def test_an_evaluation_moves_its_metrics(served: Served) -> None:
    reads = [
        reader(served, "vdiff_evaluations", status="completed"),
        reader(served, "vdiff_evaluation_samples_total", outcome="passed"),
    ]
    before = [read() for read in reads]
    made = evaluations.begin(
        served, evaluations.request(evaluations.upload(served, evaluations.sums(3)))
    )
    assert evaluations.over(served, made["id"])["status"] == "completed"
    eventually(lambda: [read() for read in reads] == [before[0] + 1, before[1] + 3])


def test_the_database_is_seen_away(served: Served, postgres_url: str) -> None:
    def is_up(value: float) -> bool:
        return f"\nvdiff_database_up {value}\n" in served.client.get("/metrics").text

    assert is_up(1.0)
    with database_away(served, postgres_url):
        eventually(lambda: is_up(0.0))
    eventually(lambda: is_up(1.0))
    MOVED.add("vdiff_database_up")


def test_none_was_forgotten(served: Served, request: pytest.FixtureRequest) -> None:
    """Runs last: every series at /metrics was read by a test above as it moved."""
    running = {item.name for item in request.session.items}
    if {name for name in globals() if name.startswith("test_")} - running:
        pytest.skip("needs the other tests of this module")
    shown = {
        line.split()[2]
        for line in served.client.get("/metrics").text.splitlines()
        if line.startswith("# TYPE vdiff_")
    }
    shown = {name for name in shown if not name.endswith("_created")}
    assert shown - MOVED == set()
