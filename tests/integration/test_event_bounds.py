"""Bounds on events in Redis: by step, by stream, by tenant, and in a Redis that fills up."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from redis.exceptions import ResponseError

from shared.diffusion_params import DiffusionParams
from shared.events import DONE_CHANNEL, MOVED_CHANNEL, Event, EventPublisher, events_key
from shared.ids import new_id
from tests.integration.conftest import Jobs
from vdiff.embedded import EmbeddedRedis

pytestmark = pytest.mark.integration


def stream_bytes(client: redis.Redis, job_id: str) -> int:
    return sum(len(fields[b"d"]) for _, fields in client.xrange(events_key(job_id)))  # type: ignore[union-attr]


def test_a_visualized_job_costs_bytes_by_its_length(served_jobs: Jobs) -> None:
    totals = {}
    for tokens in (48, 192):
        diffusion = DiffusionParams(visualize=True, block_length=48)
        job_id = served_jobs.submit(max_tokens=tokens, ignore_eos=True, diffusion=diffusion)
        assert served_jobs.wait_done(job_id, seconds=300).status == "succeeded"
        totals[tokens] = stream_bytes(served_jobs.redis, job_id)
    assert totals[192] <= 6 * totals[48]  # four times the answer: four times the bytes, not sixteen


def text_events(job_id: str, count: int, size: int) -> list[Event]:
    return [Event(job_id, "progress", {"text": "x" * size, "step": n}) for n in range(count)]


def started(job_id: str, tenant: str) -> Event:
    return Event(job_id, "started", {"attempt": 1, "worker_id": "w"}, tenant)


def test_a_stream_is_bounded_by_bytes_and_a_tenant_by_its_streams(jobs: Jobs) -> None:
    most = 200_000
    publisher = EventPublisher(
        jobs.redis,
        stream_length=10_000,
        stream_seconds=60,
        stream_bytes=most,
        tenant_bytes=5 * most,
    )
    ids = [new_id("job") for _ in range(20)]
    for job_id in ids:
        publisher.publish([started(job_id, "t")])
        for _ in range(10):
            publisher.publish(text_events(job_id, 50, 1_000))
            assert (
                stream_bytes(jobs.redis, job_id) <= most + 120_000
            )  # whole nodes of a stream go at a time
    newest = jobs.redis.xrevrange(events_key(ids[-1]), count=1)
    assert newest and b'"step":49' in newest[0][1][b"d"]  # type: ignore[index]
    kept = [job_id for job_id in ids if jobs.redis.exists(events_key(job_id))]
    assert kept == ids[-len(kept) :] and 3 <= len(kept) <= 6  # the oldest went
    other = new_id("job")
    publisher.publish(
        [started(other, "u"), *text_events(other, 50, 1_000), Event(other, "done", {"status": "x"})]
    )
    assert [
        job_id for job_id in ids if jobs.redis.exists(events_key(job_id))
    ] == kept  # a tenant pays for itself alone
    assert jobs.redis.exists(events_key(other))


def test_a_redis_that_fills_up_takes_messages_and_no_events(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path, maxmemory_bytes=64 << 20)
    try:
        client = redis.Redis.from_url(server.start())
        assert int(client.config_get("maxmemory")["maxmemory"]) == 64 << 20  # type: ignore[arg-type]
        for number in range(64):
            if client.info("memory")["used_memory"] > 0.83 * (64 << 20):
                break
            client.set(f"ballast{number}", b"x" * (1 << 20))
        publisher = EventPublisher(client, stream_length=100, stream_seconds=60)
        heard = client.pubsub(ignore_subscribe_messages=True)
        heard.subscribe(DONE_CHANNEL, MOVED_CHANNEL)
        job_id = new_id("job")
        publisher.publish(
            [*text_events(job_id, 50, 1_000), Event(job_id, "done", {"status": "succeeded"})]
        )
        assert not client.exists(events_key(job_id))
        messages = [heard.get_message(timeout=5) for _ in range(4)]
        assert {(m["channel"], m["data"]) for m in messages if m} == {
            (DONE_CHANNEL.encode(), job_id.encode()),
            (MOVED_CHANNEL.encode(), job_id.encode()),
        }
        client.lpush("queue", "a message")  # there is room for these
        with pytest.raises(ResponseError, match="maxmemory"):
            for number in range(64):
                client.set(f"more{number}", b"x" * (1 << 20))
        client.close()
    finally:
        server.stop()
