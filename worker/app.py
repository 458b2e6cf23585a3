"""The Celery application of a worker: settings only. The task is in `worker.tasks`, the process in
`worker.main`.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from celery import Celery
from kombu import Queue
from prometheus_client import Counter

from shared.errors import ConfigurationError
from shared.queue.names import queue_names
from worker import transport

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CERT_REQS = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}


def broker_url(redis_url: str) -> str:
    """The Redis URL as kombu spells it (`unix://` is `redis+socket://` there), with its TLS options
    in `broker_tls`.
    """
    parts = urlsplit(redis_url)
    if parts.scheme == "rediss":
        rest = [
            (name, value) for name, value in parse_qsl(parts.query) if not name.startswith("ssl_")
        ]
        return parts._replace(query=urlencode(rest)).geturl()
    if parts.scheme != "unix":
        return redis_url
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    options = {"virtual_host": query.get("db", "0")}
    if password := query.get("password") or parts.password:
        options["password"] = password
    return f"redis+socket://{parts.path}?{urlencode(options)}"


def broker_tls(redis_url: str) -> dict[str, Any] | None:
    """The URL's TLS options as Celery, and Flower with it, take them; None without TLS.

    With nothing said of certificates kombu would check none, where redis-py does: then they are
    checked here too.

    Raises:
        ConfigurationError: ssl_cert_reqs is none of the three.
    """
    parts = urlsplit(redis_url)
    if parts.scheme != "rediss":
        return None
    given = {
        name: values[-1] for name, values in parse_qs(parts.query).items() if name in _TLS_FILES
    }
    wanted = parse_qs(parts.query).get("ssl_cert_reqs", ["required"])[-1]
    if wanted not in _CERT_REQS:
        raise ConfigurationError(
            "VDIFF_REDIS_URL: ssl_cert_reqs is required, optional or none", param="redis_url"
        )
    return {**given, "ssl_cert_reqs": _CERT_REQS[wanted]}


def celery_app(
    redis_url: str, *, model: str | None, queues: Sequence[str] = (), dropped: Counter | None = None
) -> Celery:
    """Return an app that consumes the queues of one model, interactive first; without a model the
    given ones.

    Args:
        dropped: counts messages that cannot be read. Given, this process uses `worker.transport`; a
            process that consumes no queue of ours (Flower) keeps kombu's, which also takes the
            replies of remote control.
    """
    if dropped is not None:
        transport.install(dropped)
    app = Celery("vdiff", broker=broker_url(redis_url), set_as_current=False)
    app.conf.update(
        broker_use_ssl=broker_tls(redis_url),
        # The lease makes early acks safe; with late acks a 3 s Redis outage killed the worker in 6
        # of 6 runs.
        task_acks_late=False,
        # A worker holds only what it runs; the rest stays for others, and for a better priority.
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        # Results live in PostgreSQL.
        task_ignore_result=True,
        result_backend=None,
        broker_transport_options={
            "ack_emulation": False,  # see worker.transport
            # A Redis that is cut off is noticed within some ten seconds; without these, within a
            # minute or never.
            "socket_timeout": 5.0,
            "socket_connect_timeout": 5.0,
            "socket_keepalive": True,
            "health_check_interval": 5,
            # Priorities are queues of their own, polled in the order given; kombu's four lists per
            # queue only cost.
            "priority_steps": [0],
            "queue_order_strategy": "priority",
        },
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # Its way back to the full count needs jobs that end; a long job would keep slots from being
        # filled.
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_serializer="json",
        accept_content=["json"],
        task_queues=[
            Queue(name, exchange="", routing_key=name)
            for name in (queue_names(model) if model else queues)
        ],
        task_create_missing_queues=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
        enable_utc=True,
    )
    return app
