"""Sends webhooks: `vdiff deliver`, a process of its own that needs neither torch nor a model.

    pump           leases deliveries that are due (PostgreSQL) and puts their ids on the Celery
                   queue `vdiff.webhooks`; at most a few per receiver, so that one that hangs holds
                   up nobody
    pool threads   one attempt each: sign, resolve, check, connect to what was checked, POST, record

A delivery whose process dies keeps its lease for a minute and is then sent again: at least once,
under the same `webhook-id`. Any number of these processes work side by side.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import httpx
import redis
import structlog
from celery.worker import state as celery_state
from redis.exceptions import RedisError
from sqlalchemy import CursorResult, Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from migrations import run as migrations
from shared import liveness, metrics, tracing
from shared.background import (
    EXIT_THREAD_GONE,
    BackgroundThread,
    BackgroundThreads,
    Duty,
    OnGone,
    Pulse,
)
from shared.db.retries import persist
from shared.db.session import Database, WriteSession
from shared.errors import VDiffError
from shared.ids import new_id
from shared.links import use_prefix
from shared.logging import identify, setup_logging
from shared.metrics import (
    SENDER_CONSUMER_RESTARTS,
    SENDER_DUTY_FAILURES,
    SENDER_MESSAGES_DROPPED,
    WEBHOOK_ATTEMPTS,
    WEBHOOK_ENDPOINTS_DISABLED,
    WEBHOOK_SECONDS,
    WebhookOutcome,
)
from shared.queue import client as queue_client
from shared.queue.messages import PAYLOAD_VERSION, is_readable, push_deliveries
from shared.queue.names import DELIVER_TASK, WEBHOOK_QUEUE
from shared.settings import Settings
from shared.vault import vault_of
from shared.webhooks import repository, senders, stored_secrets, targets
from shared.webhooks.events import event_body, signed_headers
from vdiff.version import __version__
from worker.app import celery_app
from worker.consumer import make_controller

LEASE_MARGIN_SECONDS = 45.0  # beyond the timeout of the request itself
IDLE_SECONDS = 0.25
TENANT_SHARE = (3, 4)  # of what is sent at once, at most, to receivers of one tenant
REST = 4  # times as long as a look for what is due took
BEAT_SECONDS = 5.0
CLEAN_EVERY_SECONDS = 60.0
AWAY_SECONDS = 1.0
JITTER = 0.1
RETRY_AFTER_MAX_SECONDS = 86_400.0
ANSWER_MAX_BYTES = 65_536  # of a receiver's answer that are read at all
GONE = 410

_log = structlog.get_logger(__name__)


class Sender:
    """One attempt of one delivery."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        resolver: targets.Resolver = targets.resolve,
    ) -> None:
        self._database = database
        self._settings = settings
        self._vault = vault_of(settings.secret_keys)
        self._resolver = resolver
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._mine = threading.local()  # a loop and a client for each thread of the pool
        self._all: list[tuple[asyncio.Runner, httpx.AsyncClient]] = []
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Wait no longer for a PostgreSQL that is away. What is not recorded is sent again when its
        lease runs out.
        """
        self._stopping.set()

    def close(self) -> None:
        """Once no thread sends any more."""
        while self._all:
            runner, client = self._all.pop()
            runner.run(client.aclose())
            runner.close()

    def _ways(self) -> tuple[asyncio.Runner, httpx.AsyncClient]:
        """This thread's. A loop, because only there a request can be ended as a whole: every other
        timeout is one of the next byte, and a receiver that sends one now and then would hold the
        thread beyond the delivery's lease.
        """
        if not hasattr(self._mine, "ways"):
            # The system's proxies are not asked: they would connect to an address that nobody
            # checked. No connection is kept: it would belong to the address, and the next receiver
            # there might have another name, which no certificate showed.
            client = httpx.AsyncClient(
                timeout=self._settings.webhook_timeout_seconds,
                follow_redirects=False,
                trust_env=False,
                verify=self._tls,
                limits=httpx.Limits(max_keepalive_connections=0),
            )
            self._mine.ways = (asyncio.Runner(), client)
            self._all.append(self._mine.ways)
        ways: tuple[asyncio.Runner, httpx.AsyncClient] = self._mine.ways
        return ways

    def deliver(self, delivery_id: int) -> None:
        """Make the next attempt and record it; nothing when there is none to be made."""
        with self._database.read() as session:
            row = session.execute(repository.to_send(delivery_id)).one_or_none()
        if row is None:
            return  # a duplicate message, or the endpoint was deleted
        if row.endpoint_id is not None and not row.enabled:
            self._write([repository.close(row.id, row.attempts, "discarded")])
            return
        told = {
            "job_id": row.job_id,
            "event_id": row.event_id,
            "event_type": row.type,
            "attempt": row.attempts + 1,
        }
        with tracing.span("vdiff.deliver", parent=row.traceparent, kind="CLIENT", **told):
            began = time.monotonic()
            answer, outcome, error = self._post(row)
            seconds = time.monotonic() - began
            WEBHOOK_ATTEMPTS.labels(outcome=outcome).inc()
            WEBHOOK_SECONDS.observe(seconds)
            tracing.note(
                outcome=outcome, status=None if answer is None else answer.status_code, error=error
            )
            self._record(row, answer, error, duration_ms=1000 * seconds)

    def _post(self, row: Row[Any]) -> tuple[httpx.Response | None, WebhookOutcome, str | None]:
        """The answer, what became of the attempt as the metrics call it, and why it was no success."""
        url = row.endpoint_url or row.url
        if row.endpoint_id:
            secrets = [row.secret, row.previous_secret]
        elif row.key_secret:
            secrets = [row.key_secret, row.key_secret_before]
        else:
            secrets = [row.tenant_secret, row.tenant_secret_before]
        body = event_body({**row._mapping, "id": row.event_id}, row.result)
        headers = signed_headers(
            row.event_id, body, [self._vault.unseal(s) for s in secrets if s], now=datetime.now(UTC)
        )
        if traceparent := tracing.current() or row.traceparent:
            headers[tracing.HEADER] = traceparent
        try:
            target = targets.parse_target(url, allow_private=self._settings.webhook_allow_private)
            addresses = targets.checked_addresses(
                target, allow_private=self._settings.webhook_allow_private, resolver=self._resolver
            )
            answer = self._send(target, addresses, body, headers)
        except (VDiffError, targets.ForbiddenTarget) as exc:
            return None, "refused", f"refused: {exc}"
        except httpx.TimeoutException:
            return None, "timeout", f"no answer within {self._settings.webhook_timeout_seconds:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            return (
                None,
                "unreachable",
                type(exc).__name__,
            )  # its text may hold what the receiver sent
        except Exception as exc:
            # An attempt that is not recorded would be made again each time its lease ends, for
            # ever.
            _log.exception("webhook_attempt_failed_unexpectedly", delivery=row.id)
            return None, "unreachable", type(exc).__name__
        if answer.is_success:
            return answer, "delivered", None
        error = (
            "redirects are not followed" if answer.is_redirect else f"status {answer.status_code}"
        )
        return answer, "status", error

    def _send(
        self, target: targets.Target, addresses: Sequence[str], body: bytes, headers: dict[str, str]
    ) -> httpx.Response:
        """To the first address that takes the connection; name, SNI and certificate remain those of
        the URL.

        Raises:
            httpx.TimeoutException: no status within the time, however much of an answer came.
            httpx.HTTPError: no connection, or no HTTP.
        """
        runner, client = self._ways()
        try:
            return runner.run(self._send_in_time(client, target, addresses, body, headers))
        except TimeoutError as exc:
            raise httpx.ReadTimeout("no status in time") from exc

    async def _send_in_time(
        self,
        client: httpx.AsyncClient,
        target: targets.Target,
        addresses: Sequence[str],
        body: bytes,
        headers: dict[str, str],
    ) -> httpx.Response:
        deadline = asyncio.get_running_loop().time() + self._settings.webhook_timeout_seconds
        for last, address in ((one == addresses[-1], one) for one in addresses):
            url = httpx.URL(
                scheme=target.scheme, host=address, port=target.port, raw_path=target.path.encode()
            )
            request = client.build_request(
                "POST",
                url,
                content=body,
                headers={**headers, "host": target.authority},
                extensions={"sni_hostname": target.host},
            )
            try:
                async with asyncio.timeout_at(deadline):
                    answer = await client.send(request, stream=True)
            except httpx.ConnectError:
                if last:
                    raise
                continue
            # Its status is enough; the rest is read for the sake of the receiver, which might take
            # a closed connection ill.
            with suppress(httpx.HTTPError, TimeoutError):
                seen = 0
                async with asyncio.timeout_at(deadline):
                    async for chunk in answer.aiter_raw():
                        seen += len(chunk)
                        if seen > ANSWER_MAX_BYTES:
                            break
            await answer.aclose()
            return answer
        raise AssertionError("there is always an address")

    def _record(
        self, row: Row[Any], answer: httpx.Response | None, error: str | None, *, duration_ms: float
    ) -> None:
        attempt = row.attempts + 1
        code = None if answer is None else answer.status_code
        statements: list[Any] = [
            repository.note_attempt(
                row.id, attempt, status_code=code, error=error, duration_ms=round(duration_ms, 1)
            )
        ]
        waits = self._settings.webhook_retry_seconds
        if error is None:
            statements.append(repository.close(row.id, attempt, "delivered"))
            if row.endpoint_id:
                statements.append(repository.note_success(row.endpoint_id))
        elif code == GONE:
            statements.append(repository.close(row.id, attempt, "failed"))
            if row.endpoint_id:
                statements.append(repository.disable(row.endpoint_id, "gone"))
        elif attempt > len(waits):
            statements.append(repository.close(row.id, attempt, "failed"))
            if row.endpoint_id:
                statements.append(repository.disable_dead(row.endpoint_id, row.id))
        else:
            seconds = waits[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
            statements.append(
                repository.try_later(
                    row.id, attempt, after_seconds=max(seconds, retry_after(answer))
                )
            )
        self._write(statements)
        _log.info(
            "webhook_attempt",
            job_id=row.job_id,
            event_id=row.event_id,
            delivery=row.id,
            attempt=attempt,
            status=code,
            error=error,
        )

    def _write(self, statements: list[Any]) -> None:
        """Record what became of an attempt. While PostgreSQL is away, try until the process stops:
        it was sent.
        """

        def record(session: WriteSession, again: bool) -> list[str]:
            disabled = []
            for statement in statements:
                done = session.execute(statement)
                if isinstance(done, CursorResult) and done.returns_rows:
                    disabled += [row.disabled_reason for row in done]
            return disabled

        try:
            disabled = persist(self._database, record, give_up=self._stopping.is_set)
        except IntegrityError:
            # The attempt is recorded: by a COMMIT that was not answered, or by a process that took
            # over.
            _log.info("delivery_recorded_before")
            return
        for reason in disabled:
            WEBHOOK_ENDPOINTS_DISABLED.labels(reason=reason).inc()


def retry_after(answer: httpx.Response | None) -> float:
    """Seconds that the receiver asks for, as a number or a date; 0 when it does not."""
    from email.utils import parsedate_to_datetime

    text = "" if answer is None else answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), RETRY_AFTER_MAX_SECONDS)


class Pump:
    """Keeps the Celery queue filled with what is due, and the tables tidy; a thread."""

    def __init__(
        self, database: Database, client: redis.Redis, settings: Settings, sender_id: str
    ) -> None:
        self._database = database
        self._redis = client
        self._settings = settings
        self._sender_id = sender_id
        self._looked_seconds = 0.0
        # processes like this one; bounds of receivers and tenants are of all of them together
        self._live = 1
        self._skip_from = itertools.cycle((None, 1))
        self._room = threading.Event()
        self.on_gone: OnGone = lambda reason: None
        # Two threads: deleting what is old may take long, and deliveries do not wait for it.
        self._pump = BackgroundThread(
            "vdiff-pump",
            [
                Duty(
                    "sender_heartbeat",
                    self._live_on,
                    every=BEAT_SECONDS,
                    failures=SENDER_DUTY_FAILURES,
                ),
                Duty(
                    "send_due",
                    self._round,
                    every=0.0,
                    failures=SENDER_DUTY_FAILURES,
                    backoff_max=AWAY_SECONDS,
                ),
            ],
        )
        self._cleaner = BackgroundThread(
            "vdiff-cleaner",
            [
                Duty(
                    "clean_deliveries",
                    self.clean,
                    every=CLEAN_EVERY_SECONDS,
                    failures=SENDER_DUTY_FAILURES,
                )
            ],
        )
        self._threads = BackgroundThreads(lambda reason: self.on_gone(reason))
        self._threads.add(self._pump, self._cleaner)

    def start(self) -> None:
        statement = senders.register(
            self._sender_id, hostname=socket.gethostname(), pid=os.getpid(), version=__version__
        )
        with self._database.write() as session:
            session.execute(statement)
        self._threads.start()

    def watch(self, consumer: Pulse) -> None:
        """Count the consumer's loop for liveness."""
        self._threads.watch(consumer)

    def close(self) -> None:
        self._pump.stopping.set()
        self._room.set()
        self._threads.close()
        with suppress(SQLAlchemyError):
            self._beat("stopped")

    def delivered(self) -> None:
        """A receiver has room for another: look at once, else it would get a few each
        `IDLE_SECONDS` and no more.
        """
        self._room.set()

    def _beat(self, state: str = "ready") -> None:
        """From the pump's own thread, so that one that hangs is seen to hang."""
        with self._database.write() as session:
            session.execute(
                senders.beat(self._sender_id, metrics.snapshot(metrics.DELIVERY), state=state)
            )

    def _count_live(self) -> int:
        with self._database.read() as session:
            return max(1, len(session.execute(senders.live(stale_seconds=3 * BEAT_SECONDS)).all()))

    def _live_on(self) -> None:
        if not self._threads.silent(liveness.STALE_SECONDS):
            liveness.turn("deliver")
        self._beat()
        self._live = self._count_live()

    def _round(self) -> None:
        if not self.pump():
            # Behind a long queue of receivers that are full, looking takes a while: it must stay a
            # small share of the time.
            self._room.wait(max(IDLE_SECONDS, REST * self._looked_seconds))
        self._room.clear()

    def pump(self) -> int:
        """Do one round; return how many deliveries went out."""
        room = 2 * self._settings.webhook_concurrency - int(self._redis.llen(WEBHOOK_QUEUE))
        if room <= 0:
            return 0
        began = time.monotonic()
        with self._database.write() as session:
            statement = repository.lease_due(
                lease_seconds=self._settings.webhook_timeout_seconds + LEASE_MARGIN_SECONDS,
                limit=room,
                per_receiver=self._settings.webhook_per_receiver,
                per_tenant=max(
                    1, self._settings.webhook_concurrency * TENANT_SHARE[0] // TENANT_SHARE[1]
                )
                * self._live,
                skip_from=next(self._skip_from),
            )
            ids = [row.id for row in session.execute(statement)]
        self._looked_seconds = time.monotonic() - began
        if ids:
            try:
                push_deliveries(self._redis, ids)
            except (RedisError, OSError):
                with self._database.write() as session:
                    session.execute(repository.unlease(ids))
                raise
        return len(ids)

    def clean(self) -> float | None:
        """Delete a batch of what is old; return 0 when there is more."""
        with self._database.write() as session:
            discarded = session.execute(repository.discard_of_disabled())
        with self._database.write() as session:
            statement = repository.forget_events(
                older_than_seconds=self._settings.webhook_forget_seconds
            )
            forgotten = session.execute(statement)
        # A whole batch: there is more, and the next round takes it, so that no backlog outgrows
        # this.
        more = any(
            isinstance(done, CursorResult) and done.rowcount >= size
            for done, size in (
                (discarded, repository.REMOVE_CHUNK),
                (forgotten, repository.FORGET_BATCH),
            )
        )
        return 0.0 if more else None


def run(settings: Settings) -> int:
    """Send webhooks until SIGTERM; the exit code.

    Raises:
        ConfigurationError: PostgreSQL is away or not migrated, a URL is missing.
    """
    setup_logging(settings.log_level, settings.log_format)
    use_prefix(settings.root_path)
    liveness.begin("deliver")
    tracing.start("deliver")
    database_url, redis_url = settings.require_database_url(), settings.require_redis_url()
    migrations.require_current(database_url)
    database = Database(database_url, pool_size=4, max_overflow=settings.webhook_concurrency)
    with database.read() as session:
        stored_secrets.check(session, vault_of(settings.secret_keys))
    client = queue_client.connect(redis_url)
    sender_id = new_id("sender")
    identify(sender_id=sender_id)
    sender, pump = Sender(database, settings), Pump(database, client, settings, sender_id)
    app = celery_app(redis_url, model=None, queues=[WEBHOOK_QUEUE], dropped=SENDER_MESSAGES_DROPPED)

    @app.task(name=DELIVER_TASK, ignore_result=True)
    def deliver(payload: dict[str, Any]) -> None:
        if not is_readable(payload):
            _log.error("payload_version_unknown", version=payload.get("v"), known=PAYLOAD_VERSION)
            return  # its lease runs out, and a process that can read it takes it
        try:
            sender.deliver(int(payload["delivery_id"]))
            pump.delivered()
        except SQLAlchemyError as exc:
            _log.warning(
                "delivery_not_recorded", error=type(exc).__name__
            )  # sent again when its lease runs out
        except Exception:
            # Not left to Celery, which logs an exception's text: it may quote what a client or a
            # receiver sent.
            _log.exception("delivery_failed_unexpectedly")

    failures: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        sender.stop()
        celery_state.should_stop = 0  # type: ignore[assignment]

    def fail(reason: str) -> None:
        failures.append(reason)
        sender.stop()
        celery_state.should_stop = EXIT_THREAD_GONE  # type: ignore[assignment]

    consumer = Pulse("celery-consumer")
    controller = make_controller(
        app,
        name=f"deliver-{time.time_ns()}@{socket.gethostname()}",
        redis_url=redis_url,
        slots=settings.webhook_concurrency,
        pulse=consumer,
        failures=SENDER_DUTY_FAILURES,
        restarts=SENDER_CONSUMER_RESTARTS,
        on_gone=fail,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    pump.on_gone = fail
    pump.watch(consumer)
    pump.start()
    _log.info("delivery_ready", concurrency=settings.webhook_concurrency)
    try:
        controller.start()
    finally:
        pump.close()
        sender.close()
        database.dispose()
        tracing.stop()
    if failures:
        print(f"vdiff deliver: {failures[0]}; the process ends", file=sys.stderr, flush=True)
        return EXIT_THREAD_GONE
    return 0
