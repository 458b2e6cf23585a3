"""Redis is a hint: whatever anybody writes into it, only the row in PostgreSQL moves a job."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from shared.events import CANCEL_CHANNEL, DONE_CHANNEL
from shared.jobs import repository
from shared.jobs.status import JobStatus
from shared.queue.messages import job_message
from shared.queue.names import queue_name
from shared.queue.window import DISPATCH_CHANNEL
from tests.integration.conftest import Jobs, eventually
from worker.cancels import CancelListener
from worker.held import HeldAttempts

pytestmark = pytest.mark.integration

JUNK = (
    b"",
    b"\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b'{"body": 7}',
    b'{"body": "e30=", "properties": {}, "headers": {}}',
)


def test_a_message_on_the_cancel_channel_cancels_nothing(served_jobs: Jobs) -> None:
    job_id = served_jobs.submit(slow=True)
    served_jobs.wait_status(job_id, JobStatus.RUNNING)
    for _ in range(20):
        served_jobs.redis.publish(CANCEL_CHANNEL, job_id)
    for junk in JUNK:
        served_jobs.redis.publish(CANCEL_CHANNEL, junk)
        served_jobs.redis.publish(DISPATCH_CHANNEL, junk)
        served_jobs.redis.publish(DONE_CHANNEL, junk)
    row = served_jobs.wait_done(job_id, seconds=60)
    assert (row.status, served_jobs.outcomes(job_id)) == ("succeeded", ["succeeded"])


class Handle:
    """A request in an engine."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


def test_the_cancel_channel_still_is_the_fast_path(jobs: Jobs) -> None:
    held, handles = HeldAttempts(), {}
    for name in ("asked", "not asked", "another attempt"):
        job_id = jobs.submit(push=0)
        [row] = jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=600))
        handles[name] = handle = Handle()
        held.add(job_id, row.attempt + (name == "another attempt")).attach(handle)
        if name != "not asked":
            jobs.execute(repository.request_cancel(job_id))
    listener = CancelListener(jobs.redis, jobs.database, held, lambda _: None)
    listener.thread.start()
    try:
        eventually(
            lambda: jobs.redis.pubsub_numsub(CANCEL_CHANNEL)[0][1] > 0,
            what="the listener subscribed",
        )
        for one in held.all():  # the one that is to stop is told of last
            jobs.redis.publish(CANCEL_CHANNEL, one.job_id)
        jobs.redis.publish(CANCEL_CHANNEL, held.all()[0].job_id)
        assert handles["asked"].aborted.wait(30)
        assert not handles["not asked"].aborted.is_set()
        assert not handles["another attempt"].aborted.is_set()
    finally:
        listener.thread.close()


def test_junk_in_a_queue_stops_no_worker(served_jobs: Jobs) -> None:
    with served_jobs.database.read() as session:
        workers = (
            session.execute(text("SELECT id FROM workers WHERE state = 'ready'")).scalars().all()
        )
    for priority in ("interactive", "normal", "bulk"):
        for junk in JUNK:
            served_jobs.redis.lpush(queue_name(served_jobs.model, priority), junk)
    assert served_jobs.wait_done(served_jobs.submit()).status == "succeeded"
    eventually(
        lambda: (
            not any(
                served_jobs.redis.llen(queue_name(served_jobs.model, p))
                for p in ("interactive", "normal", "bulk")
            )
        ),
        what="junk taken out of the queues",
    )
    assert served_jobs.wait_done(served_jobs.submit()).status == "succeeded"
    with served_jobs.database.read() as session:
        assert (
            session.execute(text("SELECT id FROM workers WHERE state = 'ready'")).scalars().all()
            == workers
        )


def test_a_message_in_another_models_queue_runs_nothing(served_jobs: Jobs) -> None:
    stranger = served_jobs.submit(push=0)
    with served_jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET model = 'another' WHERE id = :id"), {"id": stranger})
    served_jobs.redis.lpush(*job_message(stranger, queue_name(served_jobs.model, "normal")))
    after = served_jobs.submit()
    assert served_jobs.wait_done(after).status == "succeeded"
    assert (served_jobs.row(stranger).status, served_jobs.row(stranger).attempt) == ("queued", 0)


def test_messages_of_jobs_that_are_not_there_are_done_at_once(served_jobs: Jobs) -> None:
    for name in ("job_nobody", "", "x" * 10_000, "job_\u0000"):
        served_jobs.redis.lpush(*job_message(name, queue_name(served_jobs.model, "normal")))
    assert served_jobs.wait_done(served_jobs.submit()).status == "succeeded"
    assert served_jobs.redis.llen(queue_name(served_jobs.model, "normal")) == 0
