"""The Celery application of a worker: settings only. The task is in `worker.tasks`, the process in `worker.main`."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qs, urlencode, urlsplit

from celery import Celery
from kombu import Queue

from shared.queue.names import queue_names


def broker_url(redis_url: str) -> str:
    """The Redis URL as kombu spells it (`unix://` is `redis+socket://` there), and as careful: with TLS and nothing said of
    certificates kombu checks none, where redis-py does."""
    parts = urlsplit(redis_url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parse_qs(parts.query):
        return parts._replace(query="&".join(filter(None, [parts.query, "ssl_cert_reqs=required"]))).geturl()
    if parts.scheme != "unix":
        return redis_url
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    options = {"virtual_host": query.get("db", "0")}
    if password := query.get("password") or parts.password:
        options["password"] = password
    return f"redis+socket://{parts.path}?{urlencode(options)}"


def celery_app(redis_url: str, *, model: str | None, queues: Sequence[str] = ()) -> Celery:
    """An app that consumes the queues of one model, interactive first; without a model the given ones."""
    app = Celery("vdiff", broker=broker_url(redis_url), set_as_current=False)
    app.conf.update(
        # The lease makes early acks safe; with late acks a 3 s Redis outage killed the worker in 6 of 6 runs.
        task_acks_late=False,
        # A worker holds only what it runs; the rest stays for others, and for a better priority.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        # Results live in PostgreSQL.
        task_ignore_result=True,
        result_backend=None,
        broker_transport_options={
            "visibility_timeout": 3600,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # Priorities are queues of their own, polled in the order given; kombu's four lists per queue only cost.
            "priority_steps": [0],
            "queue_order_strategy": "priority",
        },
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[Queue(name, exchange="", routing_key=name) for name in (queue_names(model) if model else queues)],
        task_create_missing_queues=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
        enable_utc=True,
    )
    return app
