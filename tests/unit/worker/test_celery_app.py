"""Celery's settings, each of which is there for a reason that `docs/jobs` gives."""

from __future__ import annotations

import ssl

import pytest
import structlog

from shared.errors import ConfigurationError
from shared.queue.messages import OLDEST_PAYLOAD_VERSION, PAYLOAD_VERSION, is_readable, payload
from shared.queue.names import GENERATE_TASK
from worker.app import broker_tls, broker_url, celery_app
from worker.tasks import register_tasks


@pytest.mark.parametrize(
    ("url", "kombu"),
    [
        ("redis://:p@h:6379/3", "redis://:p@h:6379/3"),
        ("rediss://h/0?ssl_ca_certs=/ca.pem", "rediss://h/0"),
        (
            "rediss://h/0?ssl_ca_certs=/ca.pem&health_check_interval=5",
            "rediss://h/0?health_check_interval=5",
        ),
        ("unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix://:p@/run/r.sock?db=3", "redis+socket:///run/r.sock?virtual_host=3&password=p"),
    ],
)
def test_broker_urls(url: str, kombu: str) -> None:
    assert broker_url(url) == kombu


@pytest.mark.parametrize(
    ("url", "tls"),
    [
        ("redis://h/0", None),
        ("unix:///run/r.sock", None),
        ("rediss://h/0", {"ssl_cert_reqs": ssl.CERT_REQUIRED}),
        (
            "rediss://h/0?ssl_ca_certs=/ca.pem",
            {"ssl_ca_certs": "/ca.pem", "ssl_cert_reqs": ssl.CERT_REQUIRED},
        ),
        ("rediss://h/0?ssl_cert_reqs=none", {"ssl_cert_reqs": ssl.CERT_NONE}),
    ],
)
def test_certificates_are_checked_unless_the_url_says_otherwise(
    url: str, tls: dict[str, object] | None
) -> None:
    assert broker_tls(url) == tls == celery_app(url, model="m").conf.broker_use_ssl


def test_a_way_of_checking_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match="ssl_cert_reqs"):
        broker_tls("rediss://h/0?ssl_cert_reqs=sometimes")


def test_settings_that_keep_jobs_safe() -> None:
    conf = celery_app("redis://127.0.0.1:1/0", model="m").conf
    assert conf.task_acks_late is False
    assert conf.worker_disable_prefetch is True
    assert conf.task_ignore_result is True
    assert conf.result_backend is None
    assert conf.accept_content == ["json"]
    assert conf.broker_transport_options["ack_emulation"] is False
    assert conf.worker_enable_prefetch_count_reduction is False
    assert [q.name for q in conf.task_queues] == [
        "vdiff.m.interactive",
        "vdiff.m.normal",
        "vdiff.m.bulk",
    ]


def test_a_payload_of_another_version_is_left_alone_and_nothing_gets_out() -> None:
    app = celery_app("redis://127.0.0.1:1/0", model="m")
    ran: list[str] = []
    left: list[str] = []

    def run(job_id: str) -> None:
        if job_id == "job_broken":
            raise RuntimeError("with a prompt in its text, which Celery would log")
        ran.append(job_id)

    register_tasks(app, run, left.append)
    task = app.tasks[GENERATE_TASK]
    for written in (
        {"v": 1, "job_id": "job_1"},
    ):  # of every version that is still read, as it was written
        task(written)
    task(payload("job_1"))
    task({"v": PAYLOAD_VERSION + 1, "job_id": "job_2"})
    task({"job_id": "job_3"})
    task({"v": PAYLOAD_VERSION + 1, "other": "things"})
    task({"v": "1", "job_id": "job_4"})
    with structlog.testing.capture_logs() as logs:
        task(payload("job_broken"))
    assert [(line["event"], line["job_id"]) for line in logs] == [
        ("job_broke_unexpectedly", "job_broken")
    ]
    assert (ran, left) == (["job_1"] * 2, ["job_2", "job_3", "job_4"])


def test_a_program_reads_what_the_one_before_it_writes() -> None:
    """In a rollout both write: the former program's messages must run on the new one."""
    assert max(1, PAYLOAD_VERSION - 1) >= OLDEST_PAYLOAD_VERSION
    assert all(is_readable({"v": v}) for v in range(OLDEST_PAYLOAD_VERSION, PAYLOAD_VERSION + 1))
    assert not is_readable({"v": PAYLOAD_VERSION + 1})
