"""Deadlines, retry, replay, estimate and purge: over real HTTP, and the sweeper's moves against a
real PostgreSQL.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from shared import serving
from shared.batches import repository as batches
from shared.batches.status import BatchStatus
from shared.events import events_key
from shared.files import repository as files
from shared.jobs import caretaking, repository
from shared.jobs.status import JobStatus
from shared.model_card import ModelCard
from tests.integration.conftest import Jobs, Served, WorkerProcess, eventually, new_key
from tests.integration.test_api_jobs import CHAT, QUESTION, chat_job, long_job

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def away(served: Served) -> str:
    """A model whose workers are away: its jobs stay queued."""
    with served.jobs.database.write() as session:
        row = session.execute(serving.get_model("vdiff-tiny")).one()
        card = ModelCard.from_json({**row.card, "name": "lives-away"})
        session.execute(serving.register_model(card, row.tokenizer_files))
    time.sleep(1.1)  # what the API trusts a list of models for
    return "lives-away"


def submit(served: Served, job: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = served.client.post("/v1/jobs", json=job, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def wait(served: Served, job: dict[str, Any]) -> dict[str, Any]:
    for _ in range(4):
        shown: dict[str, Any] = served.client.get(
            f"/v1/jobs/{job['id']}", params={"wait": 30}
        ).json()
        if shown["done"]:
            break
    return shown


@pytest.mark.parametrize("clock", ["start_by", "complete_by"])
def test_a_queued_job_that_is_too_late_expires(served: Served, away: str, clock: str) -> None:
    deadline = time.time() + 1.5
    job = submit(served, chat_job(body={"model": away}, deadlines={clock: deadline}))
    assert job["deadlines"][clock] == int(deadline)
    ended = wait(served, job)
    assert (ended["status"], ended["error"]["code"]) == ("expired", f"{clock}_passed")
    assert ended["finished_at"] >= int(deadline)
    result = served.client.get(f"/v1/jobs/{job['id']}/result")
    assert (result.status_code, result.json()["error"]["code"]) == (409, f"{clock}_passed")


@pytest.mark.parametrize(
    ("clock", "code"),
    [("max_run_seconds", "max_run_seconds_exceeded"), ("complete_by", "complete_by_passed")],
)
def test_a_running_job_is_cut_off(served: Served, clock: str, code: str) -> None:
    value = 0.3 if clock == "max_run_seconds" else time.time() + 0.6
    ended = wait(served, submit(served, long_job(deadlines={clock: value})))
    assert (ended["status"], ended["error"]["code"], ended["result"]) == ("expired", code, None)
    attempts = served.client.get(ended["urls"]["attempts"]).json()["data"]
    assert [(a["outcome"], a["error"]["code"]) for a in attempts] == [("expired", code)]
    if clock == "max_run_seconds":
        assert 0 < ended["diffusion"]["forwards"] < 480  # what it had measured is told


def test_deadlines_that_are_kept_change_nothing(served: Served) -> None:
    later = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    clocks = {"start_by": later, "complete_by": later, "max_run_seconds": 60, "retain_for": 3600}
    job = submit(served, chat_job(deadlines=clocks), prefer="wait=30")
    assert (job["status"], job["deadlines"]["retain_for"]) == ("succeeded", 3600)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "deadlines"),
        ({"finish_by": 1}, "deadlines.finish_by"),
        ({"start_by": "soon"}, "deadlines.start_by"),
        ({"start_by": 5}, "deadlines.start_by"),
        ({"complete_by": True}, "deadlines.complete_by"),
        ({"complete_by": 1e300}, "deadlines.complete_by"),
        ({"start_by": 4e9, "complete_by": 3.9e9}, "deadlines.complete_by"),
        ({"max_run_seconds": 0}, "deadlines.max_run_seconds"),
        ({"max_run_seconds": "1"}, "deadlines.max_run_seconds"),
        ({"retain_for": -1}, "deadlines.retain_for"),
        ({"retain_for": 1e12}, "deadlines.retain_for"),
    ],
)
def test_bad_deadlines_are_refused_by_name(served: Served, given: Any, param: str) -> None:
    answer = served.client.post("/v1/jobs", json=chat_job(deadlines=given))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_deadlines_are_part_of_what_an_idempotency_key_means(served: Served) -> None:
    key = {"idempotency-key": f"d-{time.time_ns()}"}
    submit(served, chat_job(deadlines={"retain_for": 60}), **key)
    answer = served.client.post(
        "/v1/jobs", json=chat_job(deadlines={"retain_for": 61}), headers=key
    )
    assert answer.status_code == 422


def test_retry_is_a_new_life_of_the_job(served: Served) -> None:
    job = submit(served, long_job())
    eventually(lambda: served.client.get(job["urls"]["self"]).json()["status"] == "running")
    assert served.client.post(job["urls"]["retry"]).json()["error"]["code"] == "job_not_done"
    served.client.post(job["urls"]["cancel"])
    assert wait(served, job)["status"] == "cancelled"
    again = served.client.post(job["urls"]["retry"])
    assert (again.status_code, again.json()["id"], again.json()["life"]) == (202, job["id"], 2)
    assert (again.json()["error"], again.json()["cancel_requested"]) == (None, False)
    ended = wait(served, job)
    assert (ended["status"], ended["attempts"]) == ("succeeded", 2)
    attempts = served.client.get(job["urls"]["attempts"]).json()["data"]
    assert [(a["life"], a["outcome"]) for a in attempts] == [(1, "cancelled"), (2, "succeeded")]
    final = served.client.post(job["urls"]["retry"])
    assert (final.status_code, final.json()["error"]["code"]) == (409, "job_succeeded")
    assert served.client.post("/v1/jobs/job_none/retry").status_code == 404


def test_retry_of_an_expired_job_takes_new_deadlines(served: Served, away: str) -> None:
    job = submit(
        served, chat_job(body={"model": away}, deadlines={"complete_by": time.time() + 0.3})
    )
    assert wait(served, job)["status"] == "expired"
    bad = served.client.post(job["urls"]["retry"], json={"deadlines": {"start_by": 1}})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "deadlines.start_by")
    assert (
        served.client.post(job["urls"]["retry"], json={"when": 1}).json()["error"]["param"]
        == "when"
    )
    later = int(time.time()) + 600
    again = served.client.post(
        job["urls"]["retry"], json={"deadlines": {"complete_by": later}}
    ).json()
    assert (again["status"], again["deadlines"]["complete_by"]) == ("queued", later)
    served.client.post(job["urls"]["cancel"])
    bare = served.client.post(job["urls"]["retry"]).json()
    assert bare["deadlines"]["complete_by"] == later  # still to come, so kept
    served.client.post(job["urls"]["cancel"])


def test_a_follower_of_the_first_life_sees_the_second(served: Served) -> None:
    from tests.integration.test_api_jobs import follow

    job = submit(served, long_job())
    eventually(lambda: served.client.get(job["urls"]["self"]).json()["status"] == "running")
    served.client.post(job["urls"]["cancel"])
    wait(served, job)
    served.client.post(job["urls"]["retry"])
    events = follow(served, job["id"])
    assert events[-1][1] == "done"
    assert events[-1][2]["status"] == "succeeded"


def test_replay_says_whether_the_text_is_the_same(served: Served) -> None:
    hot = {"temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    first = submit(served, chat_job(body=hot, metadata={"a": "b"}), prefer="wait=30")
    replay = served.client.post(first["urls"]["replay"], headers={"prefer": "wait=30"})
    assert replay.status_code == 200
    job = replay.json()
    assert job["id"] != first["id"]
    assert job["replay"] == {"of": first["id"], "same_text": True, "first_difference": None}
    assert (job["result"]["choices"], job["metadata"]) == (first["result"]["choices"], {"a": "b"})
    with served.jobs.database.write() as session:  # as if the original had said something else
        session.execute(
            text(
                "UPDATE jobs SET result = jsonb_set(CAST(result AS jsonb), '{choices,0,message,content}', to_jsonb('XX' || "
                "(result #>> '{choices,0,message,content}'))) WHERE id = :id"
            ),
            {"id": first["id"]},
        )
    other = served.client.get(job["urls"]["self"]).json()["replay"]
    assert (other["same_text"], other["first_difference"]["position"]) == (False, 0)
    assert other["first_difference"]["before"].startswith("XX")


def test_a_request_that_is_sent_again_gets_its_job_also_when_it_came_too_late(
    served: Served, away: str
) -> None:
    """A client that lost the answer repeats the request under its key; a deadline that passed since
    changes nothing.
    """
    key = {"idempotency-key": f"late-{time.time_ns()}"}
    body = chat_job(body={"model": away}, deadlines={"start_by": time.time() + 0.5})
    once = served.client.post("/v1/jobs", json=body, headers=key)
    assert once.status_code == 202
    eventually(lambda: served.client.get(once.json()["urls"]["self"]).json()["status"] == "expired")
    again = served.client.post("/v1/jobs", json=body, headers=key)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (
        202,
        once.json()["id"],
        "expired",
    )
    other = served.client.post("/v1/jobs", json=body)
    assert (other.status_code, other.json()["error"]["param"]) == (400, "deadlines.start_by")
    changed = served.client.post("/v1/jobs", json={**body, "custom_id": "other"}, headers=key)
    assert changed.status_code == 400


def test_a_replay_that_is_sent_again_is_the_same_job(served: Served) -> None:
    first, second = (submit(served, chat_job(), prefer="wait=30") for _ in range(2))
    key = {"idempotency-key": f"replay-{first['id']}"}
    once, again = (served.client.post(first["urls"]["replay"], headers=key) for _ in range(2))
    assert once.json()["id"] == again.json()["id"] != first["id"]
    clash = served.client.post(second["urls"]["replay"], headers=key)
    assert (clash.status_code, clash.json()["error"]["code"]) == (422, "idempotency_key_reused")
    retries = [
        served.client.post(second["urls"]["replay"], headers={"x-stainless-retry-count": n})
        for n in "01"
    ]
    assert retries[0].json()["id"] == retries[1].json()["id"]
    assert served.client.post(second["urls"]["replay"]).json()["id"] != retries[0].json()["id"]
    for bad in ("job_none", "job_" + "0" * 32, "nothing"):
        assert served.client.post(f"/v1/jobs/{bad}/replay").status_code == 404


def test_replay_refuses_what_cannot_be_the_same(served: Served, away: str) -> None:
    queued = submit(served, chat_job(body={"model": away}))
    answer = served.client.post(queued["urls"]["replay"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_succeeded")
    served.client.post(queued["urls"]["cancel"])
    job = submit(served, chat_job(), prefer="wait=30")
    with served.jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET revision = 'older' WHERE id = :id"), {"id": job["id"]}
        )
    answer = served.client.post(job["urls"]["replay"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_revision_changed")


def test_estimate_accepts_nothing(served: Served) -> None:
    tag = f"estimate-{time.time_ns()}"
    answer = served.client.post(
        "/v1/jobs/estimate", json=chat_job(body={"max_tokens": 32}, metadata={"tag": tag})
    )
    assert answer.status_code == 200
    found = answer.json()
    assert found["tokens"]["max_completion"] == 32
    assert found["tokens"]["max_total"] == found["tokens"]["prompt"] + 32
    assert 1 <= found["forwards"]["min"] <= found["forwards"]["max"] == 32
    eventually(
        lambda: (
            (
                served.client.post("/v1/jobs/estimate", json=chat_job()).json()["expected_seconds"]
                or 0
            )
            > 0
        ),
        what="measured by a worker's heartbeat",
    )
    assert served.client.get("/v1/jobs", params={"metadata[tag]": tag}).json()["data"] == []
    bad = served.client.post("/v1/jobs/estimate", json=chat_job(body={"max_tokens": 0}))
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "max_tokens")


def test_purge_leaves_the_ledger_and_a_tombstone(served: Served) -> None:
    running = submit(served, long_job())
    assert served.client.delete(running["urls"]["self"]).json()["error"]["code"] == "job_not_done"
    assert (
        served.client.get(f"{running['urls']['self']}/steps").json()["error"]["code"]
        == "job_not_done"
    )
    served.client.post(running["urls"]["cancel"])
    secret = f"tell-nobody-{time.time_ns()}"
    body = {"messages": [{"role": "user", "content": secret}], "stop": [secret]}
    job = submit(served, chat_job(body=body, custom_id="c"), prefer="wait=30")
    assert served.jobs.redis.exists(events_key(job["id"]))
    asked = served.client.get(f"{job['urls']['self']}/input")
    assert asked.json() == {
        "object": "job.input",
        "job_id": job["id"],
        "body": chat_job(body=body)["body"],
    }
    other = {"authorization": f"Bearer {new_key(served.jobs, tenant='another')}"}
    assert (
        served.client.get(f"{job['urls']['self']}/input", headers=other).json()["error"]["code"]
        == "job_not_found"
    )
    assert served.client.delete(job["urls"]["self"]).json() == {
        "id": job["id"],
        "object": "job.deleted",
        "deleted": True,
    }
    assert not served.jobs.redis.exists(events_key(job["id"]))  # its texts went with it
    assert served.client.delete(job["urls"]["self"]).status_code == 200
    assert served.client.get(f"{job['urls']['self']}/input").status_code == 410
    for method, path in [
        ("GET", "self"),
        ("GET", "result"),
        ("GET", "events"),
        ("POST", "retry"),
        ("POST", "replay"),
    ]:
        answer = served.client.request(method, job["urls"][path])
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_purged"), path
    assert served.client.get(f"{job['urls']['self']}/steps").status_code == 410
    ledger = served.client.get(job["urls"]["self"]).json()["job"]
    assert (ledger["status"], ledger["result"], ledger["usage"]) == (
        "succeeded",
        None,
        job["usage"],
    )
    assert ledger["purged_at"] >= ledger["finished_at"]
    listed = served.client.get("/v1/jobs", params={"limit": 100}).json()["data"]
    assert [j["purged_at"] is not None for j in listed if j["id"] == job["id"]] == [True]
    row = served.jobs.row(job["id"])
    assert secret not in str(row._mapping) and row.steps is None
    assert served.client.delete("/v1/jobs/job_none").status_code == 404


def test_an_idempotency_key_of_a_purged_job_says_so(served: Served) -> None:
    """The same request under the key is not called another one, and the job is not made again."""
    once = {"idempotency-key": f"purged-{time.time_ns()}"}
    job = served.client.post(
        "/v1/jobs", json=chat_job(), headers={**once, "prefer": "wait=30"}
    ).json()
    assert served.client.delete(job["urls"]["self"]).status_code == 200
    for path, body in (("/v1/jobs", chat_job()), (CHAT, chat_job()["body"])):
        answer = served.client.post(path, json=body, headers=once)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_purged"), path


def test_results_expire_with_retain_for(served: Served) -> None:
    job = submit(served, chat_job(deadlines={"retain_for": 0.2}), prefer="wait=30")
    assert job["status"] == "succeeded"
    eventually(lambda: served.client.get(job["urls"]["result"]).status_code == 410)
    eventually(
        lambda: not served.jobs.redis.exists(events_key(job["id"])), what="its texts went with it"
    )


def test_old_ledger_rows_are_forgotten_in_batches(jobs: Jobs) -> None:
    for _ in range(3):
        job_id = jobs.submit(push=0)
        jobs.execute(repository.request_cancel(job_id))
    keep = jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(
            text(
                "UPDATE jobs SET finished_at = now() - interval '2 days' WHERE finished_at IS NOT NULL"
            )
        )
    assert len(jobs.execute(caretaking.delete_old(older_than_seconds=86_400, limit=2))) == 2
    assert len(jobs.execute(caretaking.delete_old(older_than_seconds=86_400, limit=2))) == 1
    assert jobs.row(keep).status == "queued"


def test_a_batch_that_is_not_over_keeps_its_lines(jobs: Jobs) -> None:
    """Its files are made of them, however short results and ledger rows are kept."""
    line, other = jobs.submit(push=0), jobs.submit(push=0)
    with jobs.database.write() as session:
        values = {
            "tenant": "default",
            "endpoint": "/v1/completions",
            "input_file_id": "file-1",
            "completion_window": "1h",
            "limits": {},
            "request_hash": "x",
            "idempotency_key": None,
        }
        session.execute(batches.create({"id": "batch_1", **values}, 3600))
        session.execute(
            text(
                "UPDATE batches SET status = 'in_progress', total = 1, stored = 1, holder = 'late'"
            )
        )
        session.execute(
            text("UPDATE jobs SET batch_id = 'batch_1', batch_line = 1 WHERE id = :id"),
            {"id": line},
        )
        session.execute(
            text(
                "UPDATE jobs SET status = 'failed', error = '{}', finished_at = now() - interval '2 days', "
                "purge_after = now() - interval '1 day'"
            )
        )
    assert [row.id for row in jobs.execute(caretaking.purge_due())] == [other]
    assert [row.id for row in jobs.execute(caretaking.delete_old(older_than_seconds=86_400))] == [
        other
    ]
    # Who was about to close it may not any more: a line has another life.
    assert jobs.execute(batches.reopen("batch_1", "holder_1", lease_seconds=0))
    assert not jobs.execute(
        batches.move(
            "batch_1", "late", BatchStatus.IN_PROGRESS, lease_seconds=60, status="finalizing"
        )
    )
    assert jobs.execute(batches.claim("next", 60))
    assert jobs.execute(
        batches.finish("batch_1", "next", BatchStatus.COMPLETED, now_column="completed_at")
    )
    assert [row.id for row in jobs.execute(caretaking.purge_due())] == [line]
    assert [row.id for row in jobs.execute(caretaking.delete_old(older_than_seconds=86_400))] == [
        line
    ]


@pytest.mark.parametrize(
    "status,stored,deletable",
    [
        ("validating", 0, False),
        ("in_progress", 1, False),
        ("in_progress", 2, True),
        ("cancelling", 1, False),
        ("cancelling", 2, True),
        ("finalizing", 2, True),
        ("cancelled", 2, True),
        ("failed", 1, True),
    ],
)
def test_a_file_stays_while_its_lines_are_no_jobs_yet(
    jobs: Jobs, status: str, stored: int, deletable: bool
) -> None:
    with jobs.database.write() as session:
        session.execute(
            files.begin(
                "file-1", tenant="anonymous", filename="f", purpose="batch", store="database"
            )
        )
        session.execute(
            files.make_ready("file-1", size=1, filename="f", purpose="batch", expires_seconds=None)
        )
        values = {
            "tenant": "anonymous",
            "endpoint": "/v1/completions",
            "input_file_id": "file-1",
            "completion_window": "1h",
            "limits": {},
            "request_hash": "x",
            "idempotency_key": None,
        }
        session.execute(batches.create({"id": "batch_1", **values}, 3600))
        session.execute(
            text("UPDATE batches SET total = 2, stored = :stored, status = :status, errors = '[]'"),
            {"stored": stored, "status": status},
        )
    assert bool(jobs.execute(files.start_deleting(["file-1"]))) is deletable


def test_a_success_that_comes_after_complete_by_is_expired(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET complete_by = now() - interval '1 s'"))
    jobs.execute(repository.finish(job_id, 1, JobStatus.SUCCEEDED, result={"a": 1}))
    row = jobs.row(job_id)
    assert (row.status, row.result, row.error["code"]) == ("expired", None, "complete_by_passed")
    assert jobs.outcomes(job_id) == ["expired"]


def test_the_sweeper_ends_what_its_worker_does_not(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=3600))
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET max_run_seconds = 5, started_at = now() - interval '10 s'")
        )
    assert (
        jobs.execute(caretaking.sweep_deadlines(grace_seconds=30)) == []
    )  # the worker's own turn first
    assert [r.status for r in jobs.execute(caretaking.sweep_deadlines(grace_seconds=1))] == [
        "expired"
    ]
    assert jobs.row(job_id).error["code"] == "max_run_seconds_exceeded"
    assert jobs.execute(repository.finish(job_id, 1, JobStatus.SUCCEEDED, result={"a": 1})) == []


def test_a_job_that_began_in_time_keeps_its_promise(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))
    jobs.execute(repository.drain([(job_id, 1)]))
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET start_by = now() - interval '1 s'"))
    assert jobs.execute(caretaking.sweep_deadlines(grace_seconds=0)) == []
    assert len(jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60))) == 1


def test_a_pinned_replay_is_claimed_by_its_revision_alone(jobs: Jobs) -> None:
    job_id = jobs.submit(push=0)
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET pinned_revision = 'a'"))
    assert jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60)) == []
    assert (
        jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60, revision="b")) == []
    )
    assert (
        len(jobs.execute(repository.claim(job_id, worker_id="w", lease_seconds=60, revision="a")))
        == 1
    )


@pytest.mark.parametrize(
    ("revision", "silent", "state", "waits"),
    [
        ("a", 0, "ready", True),
        ("a", 50, "draining", True),
        (None, 0, "ready", True),  # of a program that did not say what it has
        ("b", 0, "ready", False),
        ("", 0, "ready", False),
        ("a", 70, "ready", False),
        ("a", 0, "stopped", False),
    ],
)
def test_a_replay_waits_as_long_as_somebody_may_have_its_revision(
    jobs_module: Jobs, revision: str | None, silent: float, state: str, waits: bool
) -> None:
    jobs = jobs_module
    pinned, free = jobs.submit(push=0), jobs.submit(push=0)

    def serve(revision: str) -> None:
        card = ModelCard(jobs.model, "llada", 64, 10, 1, (2,), {}, {}, revision=revision)
        with jobs.database.write() as session:
            session.execute(serving.register_model(card, {"tokenizer.json": "{}"}))

    serve("a")
    with jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET pinned_revision = 'a' WHERE id = :id"), {"id": pinned}
        )
        session.execute(text("DELETE FROM workers"))
        session.execute(
            serving.register_worker(
                "w",
                model=jobs.model,
                revision=revision,
                hostname="h",
                pid=1,
                device="cpu",
                slots=1,
                version="1",
            )
        )
        values = {"silent": silent, "revision": revision, "state": state}
        session.execute(
            text(
                "UPDATE workers SET revision = :revision, state = :state, last_beat_at = now() - :silent * interval '1 s'"
            ),
            values,
        )
    assert (
        jobs.execute(caretaking.fail_unservable(silent_seconds=60)) == []
    )  # it is the registered one: workers may come
    serve("b")
    moved = jobs.execute(caretaking.fail_unservable(silent_seconds=60))
    assert [(r.id, r.status) for r in moved] == ([] if waits else [(pinned, "failed")])
    assert jobs.row(free).status == "queued"
    if not waits:
        row = jobs.row(pinned)
        assert (row.error["code"], row.error["retryable"]) == ("model_revision_changed", False)
        assert row.finished_at is not None
        assert jobs.outcomes(pinned) == []
    for job_id in (pinned, free):
        jobs.execute(repository.request_cancel(job_id))


def test_a_replay_whose_model_was_rolled_meanwhile_fails_and_says_why(
    served: Served, away: str
) -> None:
    job = submit(served, chat_job(body={"model": away}))
    with served.jobs.database.write() as session:
        session.execute(
            text("UPDATE jobs SET pinned_revision = 'older' WHERE id = :id"), {"id": job["id"]}
        )
    ended = wait(served, job)
    assert (ended["status"], ended["error"]["code"], ended["attempts"]) == (
        "failed",
        "model_revision_changed",
        0,
    )


def test_a_worker_that_sleeps_through_a_deadline(
    jobs: Jobs, start_worker: Callable[..., WorkerProcess]
) -> None:
    """SIGSTOP over complete_by: another worker's sweeper expires the job, and the sleeper's end
    changes nothing.
    """
    import signal

    sleeper = start_worker().wait_ready()
    job_id = jobs.submit(slow=True)
    jobs.wait_status(job_id, JobStatus.RUNNING)
    with jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET complete_by = now() + interval '1 s'"))
    sleeper.signal(signal.SIGSTOP)
    start_worker().wait_ready()
    row = jobs.wait_done(job_id)
    assert (row.status, row.error["code"]) == ("expired", "complete_by_passed")
    sleeper.signal(signal.SIGCONT)
    time.sleep(1.0)
    assert jobs.row(job_id).status == "expired"


def test_chat_is_what_it_was(served: Served) -> None:
    answer = served.client.post(
        CHAT, json={"model": "vdiff-tiny", "messages": QUESTION, "max_tokens": 16}
    )
    assert answer.json()["choices"][0]["message"]["content"] == "42"
