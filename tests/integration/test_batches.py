"""Files and batches with the unmodified `openai` package over real HTTP: what a user of OpenAI's
batches relies on.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import text

from shared.batches import repository
from shared.files.objects import open_store
from shared.files.store import ContentMissing
from tests.integration.conftest import ApiProcess, Jobs, Served, WorkerProcess, eventually
from vdiff import bundled

pytestmark = pytest.mark.integration
CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    whole = {
        "model": "vdiff-tiny",
        "messages": [{"role": "user", "content": "What is 17 + 25?"}],
        "max_tokens": 16,
        **body,
    }
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": whole}


def sums(count: int) -> list[dict[str, Any]]:
    return [
        line(f"sum-{i}", messages=[{"role": "user", "content": f"What is {i} + 5?"}])
        for i in range(1, count + 1)
    ]


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def upload(client: OpenAI, lines: list[Any]) -> Any:
    return client.files.create(file=("in.jsonl", io.BytesIO(jsonl(lines))), purpose="batch")


def start(client: OpenAI, lines: list[Any], **more: Any) -> Any:
    options = {"endpoint": CHAT, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=upload(client, lines).id, **options)


def over(client: OpenAI, batch_id: str, seconds: float = 150) -> Any:
    def ended() -> Any:
        time.sleep(0.2)  # whoever asks all the time slows down what it waits for
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in OVER else None

    return eventually(ended, seconds=seconds, what="the batch's end")


def lines_of(client: OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in client.files.content(file_id).text.splitlines()]


# Files


def test_a_file_goes_up_and_comes_down(client: OpenAI) -> None:
    content = b"".join(
        b"%d %s\n" % (i, b"x" * 1000) for i in range(3000)
    )  # three chunks of the store
    file = client.files.create(file=("data ü.jsonl", content), purpose="evals")
    assert (file.object, file.filename, file.purpose, file.bytes, file.status) == (
        "file",
        "data ü.jsonl",
        "evals",
        len(content),
        "processed",
    )
    assert file.id.startswith("file-")
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id) == file
    assert file.id in [f.id for f in client.files.list(purpose="evals")]
    assert file.id not in [f.id for f in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_files_are_paged_and_expire(client: OpenAI, served: Served) -> None:
    made = [client.files.create(file=(f"{i}", b"x"), purpose="evals") for i in range(3)]
    page = client.files.list(limit=2)
    assert [f.id for f in page.data] == [made[2].id, made[1].id] and page.has_more
    assert page.get_next_page().data[0].id == made[0].id
    expiring = client.files.create(
        file=("e", b"x"), purpose="evals", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert expiring.expires_at == expiring.created_at + 3600
    with served.jobs.database.write() as session:
        session.execute(
            text("UPDATE files SET expires_at = now() WHERE id = :id"), {"id": expiring.id}
        )
    with pytest.raises(openai.NotFoundError):
        client.files.content(expiring.id)


@pytest.mark.parametrize(
    "fields,files,param",
    [
        ({"purpose": "batch"}, {}, "content-type"),
        ({}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "fine-tune"}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "batch"}, {"file": ("a", b"")}, "file"),
        ({"purpose": "batch"}, {"image": ("a", b"x")}, "image"),
        ({"purpose": "batch", "color": "red"}, {"file": ("a", b"x")}, "color"),
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "123456789x",
            },
            {"file": ("a", b"x")},
            "expires_after.seconds",
        ),
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "5",
            },
            {"file": ("a", b"x")},
            "expires_after.seconds",
        ),
    ],
)
def test_bad_uploads_are_named(
    served: Served, fields: dict[str, str], files: dict[str, tuple[str, bytes]], param: str
) -> None:
    answer = served.client.post("/v1/files", data=fields, files=files)
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["param"] == param


def files_and_chunks(served: Served) -> tuple[int, int]:
    with served.jobs.database.read() as session:
        files: int = session.execute(text("SELECT count(*) FROM files")).scalar_one()
        chunks: int = session.execute(text("SELECT count(*) FROM file_chunks")).scalar_one()
    return files, chunks


def test_a_truncated_upload_leaves_nothing(served: Served) -> None:
    before = files_and_chunks(served)
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + b"x" * 3_000_000
    )
    answer = served.client.post(
        "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=B"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "incomplete_upload")
    assert files_and_chunks(served) == before
    # And one whose connection breaks.
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=B\r\n"
        connection.sendall(head.encode() + b"Content-Length: 90000000\r\n\r\n" + body)
    eventually(lambda: files_and_chunks(served) == before, what="nothing left")


# Batches


def test_a_batch_from_upload_to_download(client: OpenAI, served: Served) -> None:
    batch = start(client, sums(20), metadata={"team": "x"})
    assert (batch.object, batch.status, batch.endpoint, batch.metadata) == (
        "batch",
        "validating",
        CHAT,
        {"team": "x"},
    )
    assert batch.expires_at == batch.created_at + 24 * 3600
    batch = over(client, batch.id)
    assert (batch.status, batch.model, batch.error_file_id) == ("completed", "vdiff-tiny", None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.usage.output_tokens > 0
    assert batch.outcome == "all_succeeded"
    made = lines_of(client, batch.output_file_id)
    assert [m["custom_id"] for m in made] == [f"sum-{i}" for i in range(1, 21)]
    for i, one in enumerate(made, 1):
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        assert one["response"]["body"]["choices"][0]["message"]["content"] == str(i + 5)
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert batch.id in [b.id for b in client.batches.list(limit=100)]
    # Its lines are ordinary jobs.
    job = served.client.get(f"/v1/jobs/{made[0]['response']['request_id']}").json()
    assert (job["batch_id"], job["custom_id"], job["priority"]) == (batch.id, "sum-1", "bulk")
    assert (
        len(
            served.client.get("/v1/jobs", params={"batch_id": batch.id, "limit": 100}).json()[
                "data"
            ]
        )
        == 20
    )


BAD_LINES: list[tuple[Any, str, str | None]] = [
    (b'{"custom_id": "b", \n', "invalid_json", "body"),
    (b"\xff\xfe\n", "invalid_utf8", "body"),
    (line("sum-1"), "duplicate_custom_id", "custom_id"),
    ({**line("b"), "url": "/v1/completions"}, "mismatched_endpoint", "url"),
    ({**line("b"), "method": "GET"}, "invalid_parameter", "method"),
    ({k: v for k, v in line("b").items() if k != "custom_id"}, "missing_parameter", "custom_id"),
    ({**line("b"), "extra": 1}, "unknown_parameter", "extra"),
    (line("b", model="another"), "mismatched_model", "body.model"),
    (line("b", max_tokens=0), "invalid_parameter", "body.max_tokens"),
    (line("b", diffusion={"threshold": 2}), "invalid_parameter", "body.diffusion.threshold"),
    (line("b", stream=True), "invalid_parameter", "body.stream"),
    (b'{"custom_id": "' + b"x" * 10_000_000 + b'"}\n', "line_too_long", None),
]


@pytest.mark.parametrize(
    "bad,code,param", BAD_LINES, ids=[f"{c}-{i}" for i, (_, c, _) in enumerate(BAD_LINES)]
)
def test_one_bad_line_fails_the_batch_before_any_ran(
    client: OpenAI, served: Served, bad: Any, code: str, param: str | None
) -> None:
    batch = over(client, start(client, [*sums(300), bad, line("after")]).id)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    (error,) = batch.errors.data
    assert (error.line, error.code, error.param) == (301, code, param)
    assert served.client.get("/v1/jobs", params={"batch_id": batch.id}).json()["data"] == []


def test_all_bad_lines_are_told_with_their_numbers(client: OpenAI) -> None:
    lines = [line(f"l-{i}", max_tokens=0 if i in (3, 7) else 4) for i in range(1, 10)]
    batch = over(client, start(client, [b"\n", *lines]).id)
    assert [e.line for e in batch.errors.data] == [4, 8]


def test_a_model_nobody_served_and_a_file_without_lines(client: OpenAI) -> None:
    batch = over(client, start(client, [line("a", model="never-served")]).id)
    assert (batch.status, batch.errors.data[0].code, batch.errors.data[0].line) == (
        "failed",
        "model_not_found",
        1,
    )
    batch = over(client, start(client, [b"\n\n"]).id)
    assert (batch.status, batch.errors.data[0].code) == ("failed", "empty_file")


def test_a_batch_tells_what_becomes_of_it(client: OpenAI, served: Served) -> None:
    batch = start(client, sums(2))
    told = []
    with served.client.stream("GET", f"/v1/batches/{batch.id}/events") as answer:
        for row in answer.iter_lines():  # ends by itself, with the batch
            if row.startswith("event: "):
                told.append(row[7:])
            elif row.startswith("data: "):
                last = json.loads(row[6:])
    assert set(told[:-1]) <= {"batch"} and told[-1] == "done"
    assert (last["status"], last["request_counts"]["completed"]) == ("completed", 2)
    assert served.client.get("/v1/batches/batch_none/events").status_code == 404


@pytest.mark.parametrize(
    "change,param",
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "5s"}, "completion_window"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"color": "red"}, "color"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": "123456789x"}},
            "output_expires_after.seconds",
        ),
    ],
)
def test_bad_batches_are_named(
    client: OpenAI, served: Served, change: dict[str, Any], param: str
) -> None:
    body = {
        "input_file_id": upload(client, sums(1)).id,
        "endpoint": CHAT,
        "completion_window": "24h",
        **change,
    }
    answer = served.client.post("/v1/batches", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def long_line(custom_id: str, tokens: int = 480) -> dict[str, Any]:
    return line(custom_id, max_tokens=tokens, ignore_eos=True, diffusion={"block_length": tokens})


@pytest.mark.timeout(400)
def test_cancel_keeps_what_is_done_and_retry_runs_the_rest(client: OpenAI, served: Served) -> None:
    batch = start(client, [*sums(3), *[long_line(f"long-{i}", 120) for i in range(8)]])
    first = eventually(
        lambda: served.client.get(f"/v1/batches/{batch.id}/items?status=succeeded&limit=2").json()[
            "data"
        ],
        seconds=60,
    )
    number = first[0]["line"]
    assert first[0]["custom_id"] == f"sum-{number}"  # a partial result, while it runs
    whole = served.client.get(first[0]["urls"]["self"]).json()
    assert whole["response"]["body"]["choices"][0]["message"]["content"] == str(number + 5)
    # A line stays what it is while the files that it will be in are not written.
    purge = served.client.delete(f"/v1/jobs/{first[0]['job_id']}")
    assert (purge.status_code, purge.json()["error"]["code"]) == (409, "batch_not_over")
    last = served.client.get(f"/v1/batches/{batch.id}/items").json()["data"][-1]
    assert served.client.post(f"/v1/jobs/{last['job_id']}/cancel").json()["status"] == "cancelled"
    retry = served.client.post(f"/v1/jobs/{last['job_id']}/retry")
    assert (retry.status_code, retry.json()["error"]["code"]) == (409, "batch_not_over")
    assert batch.id in retry.json()["error"]["message"]
    running = client.batches.retrieve(batch.id)
    assert running.status == "in_progress" and running.request_counts.total == 11
    assert client.batches.cancel(batch.id).status == "cancelling"
    ended = over(client, batch.id)
    assert (ended.status, ended.outcome) == ("cancelled", "some_failed")
    assert ended.request_counts.completed + ended.request_counts.failed == 11
    errors = lines_of(client, ended.error_file_id)
    assert {e["error"]["code"] for e in errors} == {"batch_cancelled"}
    done = {m["custom_id"] for m in lines_of(client, ended.output_file_id)}
    assert done | {e["custom_id"] for e in errors} == {f"sum-{i}" for i in (1, 2, 3)} | {
        f"long-{i}" for i in range(8)
    }
    assert client.batches.cancel(batch.id).status == "cancelled"  # once more changes nothing
    # What was purged after the end says so in the next files.
    assert served.client.delete(f"/v1/jobs/{first[0]['job_id']}").status_code == 200
    # Items, paged.
    seen, cursor = [], None
    while True:
        query = {"limit": 3, "status": "cancelled", **({"cursor": cursor} if cursor else {})}
        page = served.client.get(f"/v1/batches/{batch.id}/items", params=query).json()
        seen += [item["custom_id"] for item in page["data"]]
        if not page["has_more"]:
            break
        cursor = page["next_cursor"]
    assert seen == [e["custom_id"] for e in errors]
    # Another life for them.
    retried = served.client.post(f"/v1/batches/{batch.id}/retry_failed").json()
    assert (retried["status"], retried["retried"], retried["cancelled_at"]) == (
        "in_progress",
        len(errors),
        None,
    )
    ended = over(client, batch.id, seconds=240)
    assert (ended.status, ended.request_counts.completed) == ("completed", 11)
    written = {m["custom_id"]: m for m in lines_of(client, ended.output_file_id)}
    assert len(written) == 11
    assert written.pop(first[0]["custom_id"])["error"]["code"] == "job_purged"
    assert {m["error"] for m in written.values()} == {None}
    again = served.client.post(f"/v1/batches/{batch.id}/retry_failed")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "nothing_to_retry")


def test_a_batch_is_made_once_however_often_it_is_sent(client: OpenAI, served: Served) -> None:
    file = upload(client, sums(1))
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    first = served.client.post(
        "/v1/batches", json=body, headers={"x-stainless-retry-count": "0"}
    ).json()
    again = served.client.post(
        "/v1/batches", json=body, headers={"x-stainless-retry-count": "1"}
    ).json()
    other = served.client.post("/v1/batches", json=body).json()
    assert first["id"] == again["id"] != other["id"]
    key = {"idempotency-key": file.id}
    keyed = [
        served.client.post("/v1/batches", json=body, headers=key).json()["id"] for _ in range(2)
    ]
    assert keyed[0] == keyed[1]
    clash = served.client.post("/v1/batches", json={**body, "completion_window": "1h"}, headers=key)
    assert clash.status_code == 422


# What goes wrong in the middle; with processes of their own


@pytest.fixture
def whole(jobs: Jobs, tmp_path: Path) -> Iterator[Callable[..., ApiProcess]]:
    """Start an API of one's own; a worker with the bundled model runs beside it."""
    apis: list[ApiProcess] = []
    worker = WorkerProcess(
        jobs,
        tmp_path / "worker.log",
        model=bundled.folder(bundled.DEFAULT_MODEL),
        served_model_name="vdiff-tiny",
    )
    jobs.model = "vdiff-tiny"

    def api(**settings: object) -> ApiProcess:
        apis.append(
            ApiProcess(
                jobs,
                tmp_path / f"api-{len(apis)}.log",
                lease_seconds=3,
                heartbeat_seconds=1,
                sweep_seconds=0.5,
                **settings,
            )
        )
        return apis[-1].wait_ready()

    try:
        worker.wait_ready()
        yield api
    finally:
        for process in (*apis, worker):
            process.end()


@pytest.mark.timeout(400)
def test_a_restart_in_the_middle_loses_and_repeats_nothing(
    whole: Callable[..., ApiProcess], jobs: Jobs
) -> None:
    count = 1500
    lines = [line(f"r-{i}", max_tokens=1) for i in range(count)]
    api = whole()
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    batch = start(client, lines)
    kills = 0
    for at_least in (1, 500):  # in the middle of storing, twice

        def stored(least: int = at_least) -> bool:
            with jobs.database.read() as session:
                return session.execute(text("SELECT stored FROM batches")).scalar_one() >= least

        eventually(stored, seconds=60)
        api.end()  # kill -9
        kills += 1
        api = whole()
        client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)

    def all_stored() -> bool:
        with jobs.database.read() as session:
            return session.execute(text("SELECT stored FROM batches")).scalar_one() == count

    eventually(all_stored, seconds=60, what="all lines are jobs")
    with jobs.database.read() as session:
        row = session.execute(
            text(
                "SELECT count(*) AS n, count(DISTINCT custom_id) AS ids, count(DISTINCT batch_line) AS lines FROM jobs"
            )
        ).one()
    assert (kills, row.n, row.ids, row.lines) == (2, count, count, count)
    client.batches.cancel(batch.id)
    ended = over(client, batch.id)
    assert ended.status == "cancelled"
    assert ended.request_counts.completed + ended.request_counts.failed == count
    written = [ended.output_file_id, ended.error_file_id]
    assert sum(len(lines_of(client, f)) for f in written if f) == count


def test_a_cancelled_batch_accounts_for_lines_that_were_no_jobs_yet(
    whole: Callable[..., ApiProcess],
) -> None:
    count = 2_000
    api = whole()
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    batch = start(client, [line(f"line-{i}") for i in range(count)])
    eventually(lambda: client.batches.retrieve(batch.id).status != "validating", seconds=60)
    client.batches.cancel(batch.id)
    ended = over(client, batch.id)
    assert (ended.status, ended.request_counts.total, ended.request_counts.failed) == (
        "cancelled",
        count,
        count,
    )
    assert ended.vdiff["stored"] == count
    errors = lines_of(client, ended.error_file_id)
    assert [e["custom_id"] for e in errors] == [f"line-{i}" for i in range(count)]
    assert {e["error"]["code"] for e in errors} == {"batch_cancelled"}


def test_a_batch_cancelled_before_its_lines_were_accepted_ends_without_files(
    whole: Callable[..., ApiProcess], jobs: Jobs
) -> None:
    api = whole()
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    file = upload(client, [line(f"line-{i}") for i in range(2_000)])
    with (
        jobs.database.write() as session
    ):  # hold every caretaker back: the lines are not checked meanwhile
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        session.execute(text("SELECT id FROM batches FOR UPDATE"))
        assert client.batches.retrieve(batch.id).status == "validating"
        assert session.execute(repository.request_cancel(batch.id)).scalar_one() == batch.id
    ended = over(client, batch.id, seconds=20)
    assert (ended.status, ended.request_counts.total, ended.vdiff["stored"]) == ("cancelled", 0, 0)
    assert (ended.output_file_id, ended.error_file_id, ended.outcome) == (None, None, None)
    answer = httpx.post(f"{api.url}/v1/batches/{batch.id}/retry_failed")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "batch_not_retriable")
    assert "none of its lines has been accepted" in answer.json()["error"]["message"]
    assert client.files.delete(file.id).deleted


def test_a_model_that_goes_in_the_middle_leaves_no_line_untold(
    whole: Callable[..., ApiProcess], jobs: Jobs
) -> None:
    api = whole()
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    lines = [line(f"line-{i}", max_tokens=1) for i in range(1_200)]
    batch = client.batches.create(
        input_file_id=upload(client, lines).id, endpoint=CHAT, completion_window="24h"
    )
    eventually(lambda: client.batches.retrieve(batch.id).vdiff["stored"] == 1_200, seconds=60)
    eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0, seconds=60)
    with (
        jobs.database.write() as session
    ):  # as if they were being stored, and the model then serves something else
        session.execute(text("DELETE FROM jobs WHERE batch_line > 700"))
        session.execute(
            text(
                "UPDATE batches SET stored = 700, holder = NULL, lease_until = now() + interval '2 s'"
            )
        )
        session.execute(
            text("UPDATE models SET card = jsonb_set(card, '{capabilities,endpoints}', '[]')")
        )
    ended = over(client, batch.id)
    stored = ended.vdiff["stored"]
    assert (ended.status, ended.errors.data[0].code, stored) == ("failed", "invalid_parameter", 700)
    done = {m["custom_id"] for m in lines_of(client, ended.output_file_id)}
    errors = {m["custom_id"]: m["error"]["code"] for m in lines_of(client, ended.error_file_id)}
    assert (
        done
        and done | set(errors) == {f"line-{i}" for i in range(1_200)}
        and not done & set(errors)
    )
    assert [errors[f"line-{i}"] for i in range(700, 1_200)] == ["invalid_parameter"] * 500
    assert ended.request_counts.completed == len(done) and ended.request_counts.failed == len(
        errors
    )
    assert ended.outcome == "some_failed"


def test_a_file_in_use_stays_and_the_window_ends_a_batch(
    whole: Callable[..., ApiProcess], jobs: Jobs
) -> None:
    api = whole()
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    file = upload(client, [long_line(f"l-{i}") for i in range(40)])
    with jobs.database.write() as session:  # hold every caretaker back
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="60s")
        session.execute(text("SELECT id FROM batches FOR UPDATE"))
        answer = httpx.delete(f"{api.url}/v1/files/{file.id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "file_in_use")
    eventually(lambda: client.batches.retrieve(batch.id).vdiff["stored"] == 40)
    assert client.files.delete(file.id).deleted  # its lines are jobs now
    with jobs.database.write() as session:  # a minute passes
        session.execute(text("UPDATE batches SET expires_at = now()"))
        session.execute(
            text("UPDATE jobs SET complete_by = now() WHERE status IN ('queued', 'running')")
        )
    ended = over(client, batch.id)
    assert ended.status == "expired"
    assert {e["error"]["code"] for e in lines_of(client, ended.error_file_id)} == {"batch_expired"}


def test_content_in_a_file_system(whole: Callable[..., ApiProcess], tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    api = whole(file_store=f"file://{folder}", max_file_bytes=3_000_000)
    client = OpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0)
    batch = over(client, start(client, sums(3)).id)
    assert [m["custom_id"] for m in lines_of(client, batch.output_file_id)] == [
        "sum-1",
        "sum-2",
        "sum-3",
    ]
    kept = {p.name for p in folder.rglob("*") if p.is_file()}
    assert kept == {batch.input_file_id, batch.output_file_id}
    with pytest.raises(openai.APIStatusError) as too_large:
        client.files.create(file=("big", b"x" * 3_000_001), purpose="batch")
    assert too_large.value.status_code == 413
    client.files.delete(batch.output_file_id)
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {batch.input_file_id}


async def test_an_object_store_says_what_is_gone(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    async with store.writer("file-a") as writer:
        await writer.write(b"x" * 10)
    assert b"".join([part async for part in store.read("file-a", 10)]) == b"x" * 10
    with pytest.raises(ContentMissing, match="10 bytes"):
        async for _ in store.read("file-a", 11):
            pass
    await store.delete("file-a")
    await store.delete("file-a")
    with pytest.raises(ContentMissing):
        async for _ in store.read("file-a", 10):
            pass
    with pytest.raises(RuntimeError):
        async with store.writer("file-b") as writer:
            await writer.write(b"y" * 10)
            raise RuntimeError
    await asyncio.sleep(0)
    with pytest.raises(ContentMissing):
        async for _ in store.read("file-b", 10):
            pass
