"""Maintenance in an API process: the duties of `shared.maintenance` in threads of their own, with
their own small pools.

So deadlines, retention and lease recovery go on while no worker lives, and the event loop waits for
none of it.
"""

from __future__ import annotations

from contextlib import suppress

from redis.exceptions import RedisError

from shared import metrics
from shared.background import BackgroundThreads, OnGone
from shared.db.session import Database
from shared.events import EventPublisher
from shared.maintenance import POOL_SIZE, Maintenance
from shared.queue import client as queue_client
from shared.settings import Settings

REDIS_TIMEOUT_SECONDS = 2.0


class MaintenanceProcess:
    """The threads and their connections; connects when the first duty is due."""

    def __init__(self, settings: Settings, on_gone: OnGone) -> None:
        self._database = Database(
            settings.require_database_url(), pool_size=POOL_SIZE, max_overflow=0
        )
        self._redis = queue_client.connect(
            settings.require_redis_url(), timeout_seconds=REDIS_TIMEOUT_SECONDS
        )
        publisher = EventPublisher(
            self._redis,
            stream_length=settings.event_stream_length,
            stream_seconds=settings.event_stream_seconds,
        )
        self.maintenance = Maintenance.from_settings(
            settings,
            self._database,
            self._redis,
            publisher,
            metrics.API_DUTY_FAILURES,
            removes_deleted=True,
        )
        self._threads = BackgroundThreads(on_gone)
        self._threads.add(*self.maintenance.threads)

    def start(self) -> None:
        self._threads.start()

    def close(self) -> None:
        """End the threads, waiting a bounded time for the duty in progress."""
        self._threads.close()
        self._database.dispose()
        with suppress(RedisError, OSError):
            self._redis.close()
