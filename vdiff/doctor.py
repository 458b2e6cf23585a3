"""`vdiff doctor`: looks at every part from where it stands, and says of each that it is well or
what to do.

A check gives one line; `bad` is what keeps jobs from being accepted, run or told of, `note` what
will, or looks odd. It changes nothing, and one part that does not answer does not keep it from
looking at the others.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import redis
from redis.exceptions import RedisError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from migrations import run as migrations
from shared import checkup, health, serving
from shared.db.session import Database, ReadSession, database_url
from shared.errors import ConfigurationError
from shared.jobs import lanes, suspects
from shared.settings import Settings
from shared.vault import CLEAR, Vault, vault_of
from shared.webhooks import senders, stored_secrets
from vdiff.local import api_url
from vdiff.progress import duration
from vdiff.version import __version__

State = Literal["ok", "note", "bad"]

CLOCK_SECONDS = 2.0  # signatures of webhooks are good for 5 minutes, so this is early
FREE_BYTES, FREE_SHARE = 2 * 1024**3, 0.05
INTERACTIVE_SECONDS, QUEUE_SECONDS = 60.0, 3600.0
WEBHOOK_SECONDS = 60.0
SHOWN_JOBS = 10
SENDER_SECONDS = 30.0  # six of its heartbeats
TIMEOUT_SECONDS = 5.0
CONNECTIONS_SHARE = 0.9
MIGRATE = "run `vdiff migrate`"  # the check of the migrations says more


@dataclass(frozen=True, slots=True)
class Check:
    """One line: which part, how it is, what was seen, and what to do about it."""

    name: str
    state: State
    text: str
    advice: str | None = None


def examine(settings: Settings) -> Iterator[Check]:
    """All checks, each as soon as it is made."""
    yield from _from_database(settings)
    yield from _redis(settings)
    yield from disks(settings)
    yield _api(settings)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.1f} {unit}"


def _reason(exc: Exception) -> str:
    said = str(getattr(exc, "orig", None) or exc).strip()
    return said.splitlines()[0] if said else type(exc).__name__


# PostgreSQL and what it knows


def _from_database(settings: Settings) -> Iterator[Check]:
    if settings.database_url is None:
        yield Check(
            "database",
            "bad",
            "no VDIFF_DATABASE_URL, and no `vdiff up` runs in this folder",
            "set VDIFF_DATABASE_URL, or start `vdiff up` and come back to its folder",
        )
        return
    try:
        url = make_url(database_url(settings.database_url, driver="psycopg"))
    except (ConfigurationError, ValueError):
        yield Check(
            "database",
            "bad",
            "VDIFF_DATABASE_URL is no URL that can be used",
            "write it as postgresql://user:password@host:5432/name",
        )
        return
    where = f"{url.host or 'a socket'}:{url.port or 5432}/{url.database}"
    database = Database(settings.database_url, pool_size=1)
    try:
        with database.read() as session:
            session.execute(checkup.server()).one()  # the first one connects
            asked_at = time.time()
            row = session.execute(checkup.server()).one()
            took = time.time() - asked_at
            yield _database(row, where, took)
            if (
                problem := health.probe_database(database)
            ) is not None and problem.advice != MIGRATE:
                yield Check("database", "bad", f"{where}: {problem.text}", problem.advice)
            yield clock("clock", float(row.seconds) - (asked_at + took / 2), took, "PostgreSQL")
            current, head = (
                migrations.current_revision(settings.database_url),
                migrations.head_revision(),
            )
            yield migrated(current, head)
            if current == head:
                yield from _contents(session, settings)
    except SQLAlchemyError as exc:
        yield Check(
            "database", "bad", f"{where}: {_reason(exc)}", health.describe_database(exc).advice
        )
    finally:
        database.dispose()


def _database(row: Any, where: str, took: float) -> Check:
    text = (
        f"PostgreSQL {row.version.split()[0]}, {_size(row.bytes)}, answers in {took * 1000:.0f} ms"
    )
    if row.connections > CONNECTIONS_SHARE * int(row.max_connections):
        return Check(
            "database",
            "note",
            f"{text}; {row.connections} of {row.max_connections} connections are in use",
            "raise max_connections, or run fewer API processes and workers",
        )
    return Check("database", "ok", f"{text} ({where})")


def clock(name: str, skew: float, uncertain: float, whose: str) -> Check:
    """A clock of another machine against this one's, as far as the round trip lets one tell."""
    if abs(skew) - uncertain <= CLOCK_SECONDS:
        return Check(name, "ok", f"within {max(abs(skew), 0.001):.3f} s of {whose}'s")
    ahead = "behind" if skew > 0 else "ahead of"
    return Check(
        name,
        "bad",
        f"this machine is {duration(abs(skew))} {ahead} {whose}",
        "let NTP set the clocks: receivers refuse webhooks whose time is wrong",
    )


def migrated(current: str | None, head: str) -> Check:
    if current == head:
        return Check("migrations", "ok", f"at {head}, the newest")
    if current is not None and current > head:
        return Check(
            "migrations",
            "bad",
            f"the database is at {current}, this program knows {head} at most",
            "use the vdiff that the database was migrated with, or a newer one",
        )
    return Check(
        "migrations",
        "bad",
        f"the database is at {current or 'nothing'}, this program needs {head}",
        "run `vdiff migrate`",
    )


def _contents(session: ReadSession, settings: Settings) -> Iterator[Check]:
    stale = settings.worker_stale_seconds
    live = session.execute(serving.live_workers(stale_seconds=stale)).all()
    rows = session.execute(serving.recent_workers(stale_seconds=stale)).all()
    failures = session.execute(serving.recent_failures()).all()
    now = float(session.execute(checkup.server()).one().seconds)
    depths = session.execute(lanes.depths()).all()
    pairs = [(d.model, d.priority, d.tenant, d.key_id) for d in depths]
    ages = session.execute(lanes.oldest(pairs)).all() if pairs else []
    yield from workers(live, rows, failures, now)
    yield from queues(depths, ages, {w.model for w in live})
    yield from isolated(
        session.execute(suspects.counts()).all(),
        session.execute(suspects.quarantined(limit=SHOWN_JOBS)).all(),
    )
    backlog = session.execute(checkup.webhook_backlog()).one()
    yield from webhooks(
        backlog,
        session.execute(checkup.refusing_receivers()),
        session.execute(checkup.disabled_endpoints()),
    )
    yield secrets(session.execute(stored_secrets.counts()), vault_of(settings.secret_keys))
    yield sender(len(session.execute(senders.live(stale_seconds=SENDER_SECONDS)).all()), backlog)


def workers(
    live: Iterable[Any], recent: Iterable[Any], failures: Iterable[Any], now: float
) -> Iterator[Check]:
    """Check the workers: who serves what, who went silent, and who could not load a model, and why."""
    by_model: dict[str, list[Any]] = {}
    for worker in live:
        by_model.setdefault(worker.model, []).append(worker)
    for model, group in sorted(by_model.items()):
        devices = ", ".join(sorted({w.device for w in group}))
        slots = sum(w.slots for w in group)
        count = f"{len(group)} worker" + ("s" if len(group) > 1 else "")
        yield Check("workers", "ok", f"{model}: {count}, {slots} slots, {devices}")
        if versions := sorted({w.version for w in group} - {__version__}):
            yield Check(
                "workers",
                "note",
                f"{model}: of version {', '.join(versions)}, this is {__version__}",
                "finish the rollout",
            )
    if not by_model:
        yield Check(
            "workers",
            "bad",
            "none is ready; jobs are accepted and wait",
            "start one: `vdiff worker`",
        )
    for worker in recent:
        if not worker.live and worker.state != "stopped":
            silent = duration(now - worker.last_beat_at.timestamp())
            yield Check(
                "workers",
                "note" if worker.model in by_model else "bad",
                f"{worker.id} ({worker.model}, pid {worker.pid} on {worker.hostname}) is silent for {silent}",
                "it died or hangs; its jobs go to others. Its log says why",
            )
    for failure in failures:
        often = f", {failure.count} times" if failure.count > 1 else ""
        when = f"{duration(now - failure.last_at.timestamp())} ago"
        yield Check(
            "workers",
            "bad",
            f"{failure.model} did not load on {failure.hostname} ({when}{often}): {failure.message}",
            "correct what it says and start that worker again; this line goes when it is ready",
        )


def queues(depths: Iterable[Any], ages: Iterable[Any], served: set[str]) -> Iterator[Check]:
    """Check the queues: what waits, how long, and whether any worker serves it."""
    counts: dict[tuple[str, str], int] = {}
    oldest: dict[tuple[str, str], float] = {}
    for row in depths:
        counts[row.model, row.priority] = counts.get((row.model, row.priority), 0) + int(row.jobs)
    for row in ages:
        oldest[row.model, row.priority] = max(
            oldest.get((row.model, row.priority), 0.0), float(row.seconds)
        )
    if not counts:
        yield Check("queue", "ok", "nothing waits")
    for (model, priority), jobs in sorted(counts.items()):
        age = oldest.get((model, priority), 0.0)
        text = f"{model}, {priority}: {jobs} job{'s' if jobs > 1 else ''}, the oldest for {duration(age)}"
        if model not in served:
            yield Check(
                "queue", "bad", f"{text}; no worker serves {model}", f"start a worker for {model}"
            )
        elif age > (INTERACTIVE_SECONDS if priority == "interactive" else QUEUE_SECONDS):
            yield Check(
                "queue",
                "note",
                text,
                "more workers, or more slots (VDIFF_MAX_NUM_SEQS), would shorten it",
            )
        else:
            yield Check("queue", "ok", text)


def secrets(counts: Iterable[Any], keys: Vault) -> Check:
    """Check how webhook secrets are stored, and that every key that encrypts one is known."""
    found = {row.key_id: int(row.stored) for row in counts}
    if missing := sorted(set(found) - {CLEAR, *keys.key_ids}):
        return Check(
            "secrets",
            "bad",
            f"the key {', '.join(missing)} encrypts stored webhook secrets and is not known here",
            "add it to VDIFF_SECRET_KEYS",
        )
    if not keys.key_ids:
        return Check(
            "secrets",
            "note",
            "webhook secrets are stored in clear: VDIFF_SECRET_KEYS is not set",
            "set it to a key of `vdiff secrets new-key` everywhere, then run `vdiff secrets rotate`",
        )
    if others := sum(count for key_id, count in found.items() if key_id != keys.seals_as):
        return Check(
            "secrets",
            "note",
            f"{others} webhook secrets are in clear or have an older key",
            "run `vdiff secrets rotate`",
        )
    return Check("secrets", "ok", f"webhook secrets are encrypted with the key {keys.seals_as}")


def isolated(waiting: Iterable[Any], quarantined: Sequence[Any]) -> Iterator[Check]:
    """Report jobs that were lost with a worker and run apart, and those that were quarantined
    lately.
    """
    for row in waiting:
        yield Check(
            "suspects",
            "note",
            f"{row.model}: {row.waiting} jobs were lost with a worker and wait to run apart, "
            f"the oldest for {duration(float(row.oldest_seconds))}",
            "look for the end of that worker in its log and in the kernel's (out of memory)",
        )
    if quarantined:
        ids = ", ".join(row.id for row in quarantined)
        yield Check(
            "quarantine",
            "note",
            f"workers died each time they ran one of these alone: {ids}",
            "find out what the jobs have in common; POST /v1/jobs/{id}/retry runs one again, alone",
        )


def webhooks(backlog: Any, refusing: Iterable[Any], disabled: Iterable[Any]) -> Iterator[Check]:
    """Check the deliveries: what waits to be sent, which endpoints fail, and which are disabled."""
    overdue = float(backlog.overdue_seconds or 0.0)
    failing = f"; {backlog.failing} wait to be tried again" if backlog.failing else ""
    if overdue > WEBHOOK_SECONDS:
        yield Check(
            "webhooks",
            "bad",
            f"{backlog.due} to send, the oldest for {duration(overdue)}{failing}",
            "start `vdiff deliver` (`vdiff up` brings one), or look at its log",
        )
    else:
        yield Check(
            "webhooks",
            "ok",
            (f"{backlog.due} to send" if backlog.due else "nothing to send") + failing,
        )
    for receiver in refusing:
        host, said = (
            urlsplit(receiver.url).hostname,
            receiver.status_code or receiver.error or "nothing",
        )
        whose = (
            f"endpoint {receiver.endpoint_id}" if receiver.endpoint_id else "a URL of single jobs"
        )
        where = (
            f"webhook_endpoints/{receiver.endpoint_id}/deliveries"
            if receiver.endpoint_id
            else "deliveries"
        )
        yield Check(
            "webhooks",
            "note",
            f"{whose} ({host}) fails: {receiver.waiting} wait to be tried again (last: {said})",
            f"see the receiver's log; GET /v1/{where}?status=pending has every attempt",
        )
    for endpoint in disabled:
        host = urlsplit(endpoint.url).hostname
        yield Check(
            "webhooks",
            "note",
            f"endpoint {endpoint.id} ({host}) is disabled: {endpoint.disabled_reason}",
            f"mend the receiver, then POST /v1/webhook_endpoints/{endpoint.id} with enabled: true",
        )


def sender(live: int, backlog: Any) -> Check:
    """The processes that send webhooks."""
    if live:
        return Check("senders", "ok", f"{live} `vdiff deliver`")
    if backlog.due or backlog.failing:
        return Check(
            "senders",
            "bad",
            "no `vdiff deliver` is alive, and webhooks wait",
            "start `vdiff deliver` (`vdiff up` brings one)",
        )
    return Check(
        "senders",
        "note",
        "no `vdiff deliver` is alive",
        "none is needed as long as nobody asks for webhooks",
    )


# Redis, disks, API


def _redis(settings: Settings) -> Iterator[Check]:
    if settings.redis_url is None:
        yield Check(
            "redis",
            "bad",
            "no VDIFF_REDIS_URL, and no `vdiff up` runs in this folder",
            "set VDIFF_REDIS_URL",
        )
        return
    try:
        client = redis.Redis.from_url(
            settings.redis_url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
        )
    except ValueError:
        yield Check(
            "redis",
            "bad",
            "VDIFF_REDIS_URL is no URL that can be used",
            "write it as redis://host:6379/0",
        )
        return
    try:
        with closing(client):
            client.ping()
            asked_at = time.time()
            info: Any = client.info()
            took = time.time() - asked_at
            seconds, micros = client.time()
            check = redis_state(info, took)
            problem = health.probe_redis(client)
            if problem is not None and check.state != "bad":
                check = Check("redis", "bad", problem.text, problem.advice)
            yield check
            yield clock("clock", seconds + micros / 1e6 - time.time(), took, "Redis")
    except (
        RedisError,
        OSError,
        ValueError,
        TypeError,
    ) as exc:  # TypeError: an option in the URL that there is not
        advice = health.describe_redis(exc).advice
        yield Check(
            "redis", "bad", _reason(exc), f"{advice}; until then jobs are accepted and wait"
        )


def redis_state(info: dict[str, Any], took: float) -> Check:
    text = f"Redis {info.get('redis_version')}, {_size(info.get('used_memory', 0))}, answers in {took * 1000:.0f} ms"
    for name in ("rdb_last_bgsave_status", "aof_last_write_status"):
        if info.get(name, "ok") != "ok":
            return Check(
                "redis",
                "bad",
                f"{text}; {name} is {info[name]}",
                "its disk is full or not writable; see its log",
            )
    if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
        return Check(
            "redis",
            "note",
            f"{text}; it may throw messages away (maxmemory-policy {info['maxmemory_policy']})",
            "set maxmemory-policy noeviction; lost messages cost seconds, not jobs",
        )
    return Check("redis", "ok", text)


def disks(settings: Settings) -> Iterator[Check]:
    """The folders of this machine that vdiff writes to."""
    folders = {settings.data_dir.expanduser(): "VDIFF_DATA_DIR"}
    if settings.file_store is not None and settings.file_store.startswith("file://"):
        folders[Path(urlsplit(settings.file_store).path)] = "VDIFF_FILE_STORE"
    for folder, name in folders.items():
        if not folder.exists():
            continue
        usage = shutil.disk_usage(folder)
        text = f"{_size(usage.free)} of {_size(usage.total)} free in {folder}"
        if usage.free < FREE_BYTES or usage.free < FREE_SHARE * usage.total:
            yield Check(
                "disk",
                "bad",
                text,
                f"make room, or move {name}; PostgreSQL stops when nothing is left",
            )
        else:
            yield Check("disk", "ok", text)


def _api(settings: Settings) -> Check:
    url = api_url(settings)
    try:
        answer = httpx.get(f"{url.rstrip('/').removesuffix('/v1')}/health", timeout=TIMEOUT_SECONDS)
        said = answer.json()
        state, version = str(said["status"]), str(said["version"])
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        return Check(
            "api",
            "bad",
            f"{url}: {_reason(exc)}",
            "start `vdiff api` or `vdiff up`, or set VDIFF_BASE_URL",
        )
    except (ValueError, KeyError, TypeError):
        return Check(
            "api",
            "bad",
            f"{url}: something else answers there",
            "set VDIFF_BASE_URL to the API's address",
        )
    if state == "down":
        return Check("api", "bad", f"{url}: database {said.get('database')}", "see the lines above")
    if said.get("redis", "ok") != "ok":
        return Check("api", "bad", f"{url}: redis {said['redis']}", "see the lines above")
    if version != __version__:
        return Check(
            "api",
            "note",
            f"{url} is version {version}, this is {__version__}",
            "finish the rollout",
        )
    return Check("api", "ok", f"{url}, version {version}")
