"""Messages in the consumer's transport, and that Celery uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from kombu import Connection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from shared.metrics import WORKER_MESSAGES_DROPPED
from shared.queue.messages import job_message
from worker import transport
from worker.transport import NotOurs, parse_message

GOOD = job_message("job_1", "vdiff.m.normal")[1]


def broken(**changes: object) -> bytes:
    return json.dumps({**json.loads(GOOD), **changes}).encode()


def headers(**changes: object) -> bytes:
    return broken(headers={**json.loads(GOOD)["headers"], **changes})


def properties(**changes: object) -> bytes:
    return broken(properties={**json.loads(GOOD)["properties"], **changes})


def test_a_message_of_ours_is_taken_as_it_is() -> None:
    assert parse_message(GOOD) == json.loads(GOOD)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x",
        b"\xff",
        b"[]",
        b"{}",
        b"null",
        b"1",
        b'"x"',
        b"[" * 100_000,
        broken(headers=None),
        broken(headers=[]),
        headers(task=None),
        headers(id=7),
        headers(eta="x"),
        headers(expires=1),
        broken(properties=None),
        properties(delivery_info=None),
        properties(delivery_tag=None),
        properties(body_encoding="utf-8"),
        broken(body=None),
        broken(body=""),
        broken(body="e30="),
        broken(body="W10="),
        broken(body="W1tdLCB7fSwge31d"),
        broken(body="bnVsbA=="),
        broken(body="W1sxXSwge30sIHt9XQ=="),
    ],
)
def test_anything_else_is_not_ours(raw: bytes) -> None:
    with pytest.raises(NotOurs):
        parse_message(raw)


@pytest.mark.parametrize(
    "error",
    [
        ReadOnlyError,
        OutOfMemoryError,
        BusyLoadingError,
        ClusterDownError,
        MasterDownError,
        AuthenticationError,
        ResponseError,
    ],
)
def test_every_refusal_of_redis_is_an_error_of_the_connection(error: type[Exception]) -> None:
    transport.install(WORKER_MESSAGES_DROPPED)
    for url in ("redis://127.0.0.1:1/0", "rediss://127.0.0.1:1/0", "redis+socket:///nowhere"):
        connection = Connection(url)
        assert connection.transport_cls is not None and isinstance(
            connection.transport, transport.Transport
        )
        raised = (
            error("UNBLOCKED")
            if error is not ClusterDownError
            else ClusterDownError("CLUSTERDOWN x")
        )
        assert isinstance(raised, tuple(connection.connection_errors))


def test_the_app_of_a_consumer_uses_this_transport_and_flower_keeps_that_of_kombu() -> None:
    found = "from kombu import Connection; print(Connection(%r).get_transport_cls().__module__)"
    made = "from worker.app import celery_app; from shared.metrics import WORKER_MESSAGES_DROPPED as counter; "
    app = "celery_app('redis://127.0.0.1:1/0', model='m'%s); "
    for url in ("redis://127.0.0.1:1/0", "rediss://127.0.0.1:1/0", "redis+socket:///nowhere"):
        for options, module in (
            (", dropped=counter", "worker.transport"),
            ("", "kombu.transport.redis"),
        ):
            program = made + app % options + found % url
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True
            )
            assert done.stdout.strip() == module
