"""Bounds on the room of events in Redis: bytes of a job's stream, of a tenant's streams, and none
once Redis fills up.

Events are a hint, and a Redis that is full takes no message of a queue either. So a stream loses
its oldest events, a tenant its oldest streams, and where Redis has a limit of memory (`maxmemory`)
and less than a fifth is left, no event is written at all: streams then say when a job ends, and
nothing before.

    vdiff:streams:{tenant}        list; its jobs with a stream, oldest first
    vdiff:stream-bytes:{tenant}   hash; how large each stream is, and under `=` their sum
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import redis
import structlog
from redis.exceptions import ResponseError

from shared.ids import is_id

REPORT_BYTES = 32 * 1024  # a stream that grew by so much since is told to the tenant's account
STREAMS_MAX = 20_000  # of which a worker knows the size
FULL_SHARE = 0.8  # of Redis' memory: above it no events are written
LOOK_SECONDS = 2.0  # between looks at Redis' memory
_SUM = "="

# Returns how many streams went. KEYS: hash, list. ARGV: most bytes, seconds, prefix of streams,
# then job and bytes in turns.
_ACCOUNT = """
local sum = tonumber(redis.call('HGET', KEYS[1], '=') or '0') or 0
for i = 4, #ARGV, 2 do
  local before = redis.call('HGET', KEYS[1], ARGV[i])
  if not before then redis.call('RPUSH', KEYS[2], ARGV[i]) end
  sum = sum + tonumber(ARGV[i + 1]) - (tonumber(before or '0') or 0)
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
local gone = 0
while sum > tonumber(ARGV[1]) do
  local job = redis.call('LPOP', KEYS[2])
  if not job then sum = 0 break end
  sum = sum - (tonumber(redis.call('HGET', KEYS[1], job) or '0') or 0)
  redis.call('HDEL', KEYS[1], job)
  redis.call('UNLINK', ARGV[3] .. job)
  gone = gone + 1
end
redis.call('HSET', KEYS[1], '=', sum)
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return gone
"""

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Stream:
    """The bytes that this worker has written to one stream."""

    tenant: str = ""
    sizes: deque[int] = field(
        default_factory=deque
    )  # of the events that are still there, oldest first
    total: int = 0
    told: int = 0  # the size that the tenant's account has
    trimmed: bool = False


class StreamBounds:
    """One worker's account of the streams that it writes."""

    def __init__(self, *, stream_bytes: int, tenant_bytes: int, seconds: int) -> None:
        self._stream_bytes = stream_bytes
        self._tenant_bytes = tenant_bytes
        self._seconds = seconds
        self._streams: OrderedDict[str, _Stream] = OrderedDict()
        self._full = False
        self._looked_at = float("-inf")
        self._refused = False

    def note_tenant(self, job_id: str, tenant: str) -> None:
        if tenant:
            self._stream(job_id).tenant = tenant

    def length(self, job_id: str, size: int, most: int) -> int:
        """Return how many events of the stream may stay when one of so many bytes is added; `most`
        is their usual bound.
        """
        stream = self._stream(job_id)
        stream.sizes.append(size)
        stream.total += size
        while len(stream.sizes) > 1 and (
            stream.total > self._stream_bytes or len(stream.sizes) > most
        ):
            stream.total -= stream.sizes.popleft()
            stream.trimmed = True
        return len(stream.sizes) if stream.trimmed else most

    def settle(self, pipe: Any, job_ids: set[str], over: set[str]) -> int:
        """Add to the pipeline what tells the tenants' accounts; return how many commands that is.

        Args:
            over: jobs that have ended, which are forgotten here.
        """
        changed: dict[str, list[str]] = {}
        for job_id in job_ids:
            stream = self._stream(job_id)
            grown = stream.total - stream.told
            if (
                stream.tenant
                and is_id(job_id, "job")
                and (grown >= REPORT_BYTES or (grown > 0 and job_id in over))
            ):
                stream.told = stream.total
                changed.setdefault(stream.tenant, []).extend((job_id, str(stream.total)))
            if job_id in over:
                del self._streams[job_id]
        if self._refused:
            return 0
        for tenant, pairs in changed.items():
            keys = (f"vdiff:stream-bytes:{tenant}", f"vdiff:streams:{tenant}")
            pipe.eval(
                _ACCOUNT, 2, *keys, self._tenant_bytes, 2 * self._seconds, "vdiff:events:", *pairs
            )
        return len(changed)

    def refuse(self, error: Exception) -> None:
        """Redis does not run the account's script: streams are bounded one by one alone."""
        if not self._refused:
            _log.warning("tenant_streams_not_bounded", error=str(error))
        self._refused = True

    def has_room(self, client: redis.Redis) -> bool:
        """Return whether events may be written; looks at Redis' memory now and then. Raises
        redis.RedisError.
        """
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            try:
                memory: Any = client.info("memory")
            except ResponseError:  # a user that may not ask
                memory = {}
            most, used = int(memory.get("maxmemory", 0)), int(memory.get("used_memory", 0))
            full = most > 0 and used > FULL_SHARE * most
            if full != self._full:
                _log.warning(
                    "events_paused" if full else "events_go_on", used_bytes=used, most_bytes=most
                )
            self._full = full
            self._looked_at = time.monotonic()
        return not self._full

    def _stream(self, job_id: str) -> _Stream:
        stream = self._streams.get(job_id)
        if stream is None:
            stream = self._streams[job_id] = _Stream()
            if len(self._streams) > STREAMS_MAX:
                self._streams.popitem(last=False)
        return stream
