"""Evaluations over real HTTP with the bundled model: what a researcher relies on."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from shared.evaluations.sandbox_pool import SandboxPool
from tests.integration.conftest import ApiProcess, Served, eventually

pytestmark = pytest.mark.integration
OVER = ("completed", "failed", "cancelled")
EXACT = [{"type": "exact"}]
FAST = {
    "name": "fast",
    "model": "vdiff-tiny",
    "max_tokens": 16,
    "diffusion": {"algorithm": "threshold", "threshold": 0.9},
}
SLOW = {"name": "slow", "model": "vdiff-tiny", "max_tokens": 8}
_unique = iter(range(10**6))


def sums(count: int, *, wrong: int = 0) -> list[dict[str, Any]]:
    """Questions that nobody asked before: a column of their own makes them another dataset."""
    mark = f"{time.time_ns()}-{next(_unique)}"
    return [
        {"input": f"What is {i} + 5?", "reference": str(i + 5 + (i <= wrong)), "mark": mark}
        for i in range(1, count + 1)
    ]


def upload(served: Served, lines: list[Any]) -> str:
    content = b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)
    answer = served.client.post(
        "/v1/files", data={"purpose": "evals"}, files={"file": ("data.jsonl", content)}
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def request(file_id: str, *configurations: Any, **more: Any) -> dict[str, Any]:
    return {
        "dataset": {"file_id": file_id},
        "template": "{{input}}",
        "graders": EXACT,
        "configurations": list(configurations or [FAST]),
        **more,
    }


def begin(served: Served, body: Any, status: int = 201) -> dict[str, Any]:
    answer = served.client.post("/v1/evaluations", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def look(served: Served, evaluation_id: str) -> dict[str, Any]:
    answer = served.client.get(f"/v1/evaluations/{evaluation_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def over(served: Served, evaluation_id: str, seconds: float = 90) -> dict[str, Any]:
    def ended() -> Any:
        time.sleep(0.2)  # whoever asks all the time slows down what it waits for
        made = look(served, evaluation_id)
        return made if made["status"] in OVER else None

    return dict(eventually(ended, seconds=seconds, what="the evaluation's end"))


def of(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(next(c for c in evaluation["configurations"] if c["name"] == name))


def jobs_of(served: Served, run_id: str) -> int:
    with served.jobs.database.read() as session:
        statement = text("SELECT count(*) FROM jobs WHERE batch_id = :id")
        return int(session.execute(statement, {"id": run_id}).scalar_one())


def items(served: Served, evaluation_id: str, **query: Any) -> list[dict[str, Any]]:
    answer = served.client.get(f"/v1/evaluations/{evaluation_id}/items", params=query)
    assert answer.status_code == 200, answer.text
    return [whole(served, one) for one in answer.json()["data"]]


def whole(served: Served, listed: dict[str, Any]) -> dict[str, Any]:
    """A listed item with its data, its answer and what the graders said."""
    answer = served.client.get(listed["urls"]["self"])
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_from_a_dataset_to_an_answer_with_error_bars(served: Served) -> None:
    made = begin(
        served,
        request(upload(served, sums(20, wrong=2)), FAST, SLOW, name="sums", metadata={"team": "x"}),
    )
    assert (made["object"], made["status"], made["items"], made["reused"]) == (
        "evaluation",
        "in_progress",
        20,
        False,
    )
    done = over(served, made["id"])
    assert (done["status"], done["progress"], done["metadata"]) == (
        "completed",
        {"total": 40, "graded": 40},
        {"team": "x"},
    )
    fast, slow = of(done, "fast"), of(done, "slow")
    for one in (fast, slow):
        assert one["status"] == "completed" and one["results"]["outcomes"] == {
            "failed": 2,
            "passed": 18,
        }
        accuracy = one["results"]["accuracy"]
        assert (accuracy["mean"], accuracy["items"]) == (0.9, 20)
        assert (accuracy["low"], accuracy["high"]) == (
            pytest.approx(0.699, abs=1e-3),
            pytest.approx(0.9721, abs=1e-3),
        )
        assert accuracy["standard_error"] == pytest.approx((0.9 * 0.1 / 19) ** 0.5, rel=1e-4)
        assert one["results"]["device_seconds"] > 0 and one["results"]["latency_ms"]["p95"] > 0
    assert fast["results"]["tokens_per_forward"] > 1.5 * slow["results"]["tokens_per_forward"]
    # Failures first, and each with what a person needs to see why.
    page = served.client.get(f"/v1/evaluations/{made['id']}/items", params={"limit": 3}).json()
    assert [(i["outcome"], i["item"], i["configuration"]) for i in page["data"]] == [
        ("failed", 1, "fast"),
        ("failed", 1, "slow"),
        ("failed", 2, "fast"),
    ]
    first = whole(served, page["data"][0])
    assert first["output"] == "6" and first["data"]["reference"] == "7"
    seen = [*page["data"]]
    while page["has_more"]:
        params = {"limit": 15, "cursor": page["next_cursor"]}
        page = served.client.get(f"/v1/evaluations/{made['id']}/items", params=params).json()
        seen += page["data"]
    assert len({(i["configuration"], i["item"]) for i in seen}) == len(seen) == 40
    assert len(items(served, made["id"], configuration="slow", outcome="passed")) == 18
    # Each answer is an ordinary job.
    job = served.client.get(f"/v1/jobs/{seen[0]['job_id']}").json()
    assert (job["priority"], job["batch_id"], job["status"]) == (
        "bulk",
        fast["run_id"],
        "succeeded",
    )
    assert job["metadata"] == {"evaluation_id": made["id"], "configuration": "fast"}
    assert job["diffusion"]["seed"] == seen[0]["seed"]
    listed = served.client.get("/v1/evaluations").json()["data"]
    assert made["id"] in [e["id"] for e in listed]
    # Both right and wrong on the same items: nothing tells them apart.
    sides = [{"evaluation": made["id"], "configuration": name} for name in ("fast", "slow")]
    compared = served.client.post(
        "/v1/evaluations/compare", json={"first": sides[0], "second": sides[1]}
    ).json()
    assert (compared["difference"], compared["items"], compared["mcnemar"]["p_value"]) == (0, 20, 1)
    assert compared["minimum_detectable_effect"] > 0
    own = f"/v1/evaluations/{made['id']}/report"
    report = served.client.get(own).json()
    assert report["evaluation"] == done and report["comparisons"][0]["second_name"] == "slow"
    assert [i["outcome"] for i in report["not_passed"]] == ["failed"] * 4
    for header, start in (("text/html", "<!doctype html>"), ("text/markdown", "# sums\n")):
        answer = served.client.get(own, headers={"accept": header})
        assert answer.headers["content-type"].startswith(header) and answer.text.startswith(start)
        assert "90.0%" in answer.text and "sandbox" in answer.headers["content-security-policy"]
        assert (
            served.client.get(
                own, params={"format": "html" if "html" in header else "markdown"}
            ).text
            == answer.text
        )
    assert served.client.get(own, params={"format": "pdf"}).json()["error"]["param"] == "format"


def test_what_was_run_is_not_run_again(served: Served) -> None:
    lines = sums(6)
    body = request(upload(served, lines), FAST)
    first = over(served, begin(served, body)["id"])
    # The same content in another file, under another name.
    again = begin(
        served,
        {**body, **request(upload(served, lines), {**FAST, "name": "other"}), "name": "again"},
        200,
    )
    assert (again["id"], again["reused"], again["status"]) == (first["id"], True, "completed")
    assert again["added"] == [
        {"name": "fast", "run": of(first, "fast")["run_id"], "reused": True, "new_samples": 0}
    ]
    # More seeds are more answers of the same; another configuration runs alone.
    answer = served.client.post(
        f"/v1/evaluations/{first['id']}/configurations",
        json={"configurations": [{**FAST, "repeats": 3}, {**SLOW, "temperature": 0.7}]},
    ).json()
    assert [a["new_samples"] for a in answer["added"]] == [12, 6]
    done = over(served, first["id"])
    fast = of(done, "fast")
    assert (fast["seeds"], jobs_of(served, fast["run_id"])) == ([0, 1, 2], 18)
    assert fast["results"]["accuracy"]["samples"] == 18
    assert (
        fast["results"]["accuracy"]["monte_carlo_error"] == 0
    )  # temperature 0: seeds change nothing
    with served.jobs.database.read() as session:
        statement = text(
            "SELECT max(attempt), count(DISTINCT params->>'seed') FROM jobs WHERE batch_id = :id"
        )
        assert tuple(session.execute(statement, {"id": fast["run_id"]}).one()) == (1, 18)
    # A name says one thing in one evaluation.
    taken = served.client.post(
        f"/v1/evaluations/{first['id']}/configurations",
        json={"configurations": [{**SLOW, "name": "fast"}]},
    )
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "configuration_name_taken")
    # Removed, it is forgotten, and its jobs are not.
    assert served.client.delete(f"/v1/evaluations/{first['id']}").json()["deleted"] is True
    assert (
        served.client.get(f"/v1/evaluations/{first['id']}").json()["error"]["code"]
        == "evaluation_not_found"
    )
    assert jobs_of(served, fast["run_id"]) == 18
    assert begin(served, body)["id"] != first["id"]


def test_cancelled_and_gone_on_with(served: Served) -> None:
    body = request(upload(served, sums(150)), SLOW)
    made = begin(served, body)
    eventually(lambda: look(served, made["id"])["progress"]["graded"], what="the first grades")
    assert served.client.post(f"/v1/evaluations/{made['id']}/cancel").status_code == 200
    done = over(served, made["id"])
    assert done["status"] == "cancelled" and of(done, "slow")["status"] == "cancelled"
    graded = done["progress"]["graded"]
    assert 0 < graded < 150
    assert (
        served.client.post(f"/v1/evaluations/{made['id']}/cancel").json()["status"] == "cancelled"
    )
    with served.jobs.database.read() as session:
        statement = text(
            "SELECT count(*) FROM jobs WHERE batch_id = :id AND status IN ('queued', 'running')"
        )
        assert session.execute(statement, {"id": of(done, "slow")["run_id"]}).scalar_one() == 0
    again = begin(served, body, 200)
    assert again["added"][0]["new_samples"] == 150 - graded
    done = over(served, made["id"])
    outcomes = of(done, "slow")["results"]["outcomes"]
    assert (done["status"], sum(outcomes.values()), "error" in outcomes) == (
        "completed",
        150,
        False,
    )
    assert jobs_of(served, of(done, "slow")["run_id"]) == 150


def open_again(served: Served, evaluation_id: str, run_id: str, *statements: str) -> None:
    """Reopen it as if a process had left it before its end; the statements change the run `:run` in
    one transaction.
    """
    with served.jobs.database.write() as session:
        for statement in (
            *statements,
            "UPDATE evaluation_runs SET status = 'in_progress', finished_at = NULL WHERE id = :run",
        ):
            session.execute(text(statement), {"run": run_id})
        session.execute(
            text(
                "UPDATE evaluations SET status = 'in_progress', finished_at = NULL WHERE id = :id"
            ),
            {"id": evaluation_id},
        )


def test_answers_that_were_forgotten_are_said_and_the_evaluation_ends(served: Served) -> None:
    """With a short VDIFF_FORGET_AFTER_SECONDS and a long outage a job may be gone before its answer
    is graded.
    """
    made = begin(served, request(upload(served, sums(4)), {**FAST, "seeds": [1, 2]}))
    run_id = of(over(served, made["id"]), "fast")["run_id"]
    open_again(
        served,
        made["id"],
        run_id,
        "DELETE FROM evaluation_samples WHERE run_id = :run AND number IN (3, 4, 8)",
        "DELETE FROM jobs WHERE batch_id = :run AND batch_line IN (3, 4, 8)",
    )
    done = over(served, made["id"])
    one = of(done, "fast")
    assert (done["status"], done["progress"]) == ("completed", {"total": 8, "graded": 8})
    assert one["results"]["outcomes"] == {"passed": 5, "error": 3}
    assert [e["code"] for e in one["top_errors"]] == ["job_gone"]
    gone = [(i["item"], i["repeat"]) for i in items(served, made["id"]) if i["outcome"] == "error"]
    assert sorted(gone) == [(3, 0), (4, 0), (4, 1)]
    assert served.client.get(f"/v1/evaluations/{made['id']}/report").status_code == 200


def test_answers_that_are_in_are_graded_whatever_became_of_the_model(served: Served) -> None:
    """A new revision came between the last answer and its grade."""
    made = begin(served, request(upload(served, sums(4))))
    run_id = of(over(served, made["id"]), "fast")["run_id"]
    open_again(
        served,
        made["id"],
        run_id,
        "DELETE FROM evaluation_samples WHERE run_id = :run AND number IN (2, 3)",
        "UPDATE evaluation_runs SET revision = 'before' WHERE id = :run",
    )
    one = of(over(served, made["id"]), "fast")
    assert (one["status"], one["error"], one["results"]["outcomes"]) == (
        "completed",
        None,
        {"passed": 4},
    )


def test_a_killed_api_loses_and_repeats_nothing(served: Served, tmp_path: Path) -> None:
    """The API that accepted it dies as its jobs are made; the other one goes on when the lease runs
    out.
    """
    other = ApiProcess(
        served.jobs, tmp_path / "api.log", lease_seconds=3, heartbeat_seconds=1, sweep_seconds=0.5
    )
    try:
        other.wait_ready()
        body = request(upload(served, sums(200)), SLOW, FAST)
        answer = httpx.post(f"{other.url}/v1/evaluations", json=body, timeout=60)
        assert answer.status_code == 201, answer.text
        other.process.send_signal(signal.SIGKILL)
    finally:
        other.end()
    done = over(served, answer.json()["id"], seconds=150)
    assert (done["status"], done["progress"]) == ("completed", {"total": 400, "graded": 400})
    for name in ("slow", "fast"):
        one = of(done, name)
        assert jobs_of(served, one["run_id"]) == one["results"]["accuracy"]["samples"] == 200
    with served.jobs.database.read() as session:
        statement = text("SELECT max(attempt) FROM jobs WHERE batch_id IN (:a, :b)")
        ids = {"a": of(done, "slow")["run_id"], "b": of(done, "fast")["run_id"]}
        assert session.execute(statement, ids).scalar_one() == 1


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"template": None}, "missing_parameter", "template"),
    ({"colour": "red"}, "unknown_parameter", "colour"),
    ({"dataset": {}}, "invalid_parameter", "dataset"),
    ({"dataset": {"bundled": "nothing"}}, "invalid_parameter", "dataset.bundled"),
    ({"dataset": {"file_id": "file-nothing"}}, "file_not_found", "dataset.file_id"),
    ({"dataset": {"bundled": "vdiff-tiny", "limit": 0}}, "invalid_parameter", "dataset.limit"),
    ({"template": "{{question}}"}, "missing_column", "template"),
    (
        {"template": [{"role": "user", "content": "{{question}}"}]},
        "missing_column",
        "template[0].content",
    ),
    ({"template": "{{"}, "invalid_parameter", "template"),
    (
        {"graders": [{"type": "exact", "reference": "{{answer}}"}]},
        "missing_column",
        "graders[0].reference",
    ),
    ({"graders": [{"type": "regex", "pattern": "(a"}]}, "invalid_regex", "graders[0].pattern"),
    (
        {"graders": [{"type": "code", "source": "def grade("}]},
        "invalid_grader",
        "graders[0].source",
    ),
    ({"completion_window": "1s"}, "invalid_parameter", "completion_window"),
    ({"configurations": []}, "invalid_parameter", "configurations"),
    ({"configurations": [FAST, FAST]}, "invalid_parameter", "configurations[1].name"),
    (
        {"configurations": [FAST, {**FAST, "name": "other", "seed": 3}]},
        "invalid_parameter",
        "configurations[1]",
    ),
    (
        {"configurations": [{**FAST, "model": "nobody"}]},
        "model_not_found",
        "configurations[0].model",
    ),
    (
        {"configurations": [FAST, {**SLOW, "max_tokens": 0}]},
        "invalid_parameter",
        "configurations[1].max_tokens",
    ),
    (
        {"configurations": [{**FAST, "diffusion": {"threshold": 2}}]},
        "invalid_parameter",
        "configurations[0].diffusion.threshold",
    ),
    ({"configurations": [{**FAST, "colour": 1}]}, "unknown_parameter", "configurations[0].colour"),
    (
        {"configurations": [{**FAST, "messages": [{"role": "user"}]}]},
        "unknown_parameter",
        "configurations[0].messages",
    ),
    (
        {"configurations": [{**FAST, "seeds": [1, 1]}]},
        "invalid_parameter",
        "configurations[0].seeds",
    ),
]


CODE = {
    "type": "code",
    "source": "while True: pass\ndef grade(o, r, i): return True",
    "timeout_seconds": 60,
}


@pytest.mark.parametrize(
    "change,code",
    [
        ({"dataset": {"file_id": "file-nothing"}}, "file_not_found"),
        ({"dataset": {"bundled": "no"}}, "invalid_parameter"),
        ({"configurations": [{**FAST, "model": "nobody"}]}, "model_not_found"),
        ({"configurations": [{**FAST, "colour": 1}]}, "unknown_parameter"),
    ],
)
async def test_what_is_cheap_to_check_needs_no_sandbox(
    served: Served, change: dict[str, Any], code: str
) -> None:
    """Every slot of the host is taken, so that a request that needs one would be refused as busy."""
    body = {
        "dataset": {"bundled": "vdiff-tiny"},
        "template": "{{input}}",
        "graders": [CODE],
        "configurations": [FAST],
    }
    pool = SandboxPool(64, memory_mb=64)
    async with AsyncExitStack() as stack:
        for tenant in range(4):  # one tenant may not have all of them
            await stack.enter_async_context(pool.slot(f"tenant-{tenant}"))
        answer = await asyncio.to_thread(
            served.client.post, "/v1/evaluations", json={**body, **change}
        )
    assert answer.json()["error"]["code"] == code


def test_code_runs_only_once_the_evaluation_exists(served: Served) -> None:
    """Source that never ends is accepted as it compiles, and costs its own answers alone."""
    made = begin(
        served, request(upload(served, sums(1)), graders=[{**CODE, "timeout_seconds": 0.5}])
    )
    done = over(served, made["id"])
    assert of(done, "fast")["top_errors"][0]["code"] == "grader_timeout"


def test_a_grader_may_not_ask_for_more_memory_than_the_operator_allows(served: Served) -> None:
    body = request(upload(served, sums(1)), graders=[{**CODE, "memory_mb": 1024}])
    error = served.client.post("/v1/evaluations", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_parameter", "graders[0].memory_mb")
    assert "from 64 to 512" in error["message"]


@pytest.mark.parametrize("change,code,param", BAD)
def test_bad_requests_are_named(
    served: Served, change: dict[str, Any], code: str, param: str
) -> None:
    body = {
        "dataset": {"bundled": "vdiff-tiny"},
        "template": "{{input}}",
        "graders": EXACT,
        "configurations": [FAST],
        **change,
    }
    answer = served.client.post("/v1/evaluations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code in (400, 404), error["code"], error["param"]) == (
        True,
        code,
        param,
    ), error


@pytest.mark.parametrize(
    "bad,code",
    [
        ({"question": "?"}, "missing_column"),
        (b'{"input": \n', "invalid_dataset"),
        (b"[1]\n", "invalid_dataset"),
        (b'{"x": "' + b"y" * 2_000_000 + b'"}\n', "invalid_dataset"),
        (b'{"input": "\xff"}\n', "invalid_dataset"),
    ],
)
def test_a_bad_line_is_named_and_nothing_begins(served: Served, bad: Any, code: str) -> None:
    file_id = upload(served, [*sums(30), bad, *sums(3)])
    answer = served.client.post("/v1/evaluations", json=request(file_id))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert "line 31" in answer.json()["error"]["message"]
    with served.jobs.database.read() as session:
        statement = text("SELECT count(*) FROM evaluations WHERE dataset->>'file_id' = :id")
        assert session.execute(statement, {"id": file_id}).scalar_one() == 0


def test_the_file_may_go_and_a_gutted_one_is_refused(served: Served) -> None:
    file_id = upload(served, sums(8))
    made = begin(served, request(file_id))
    assert served.client.delete(f"/v1/files/{file_id}").status_code == 200
    assert of(over(served, made["id"]), "fast")["results"]["outcomes"] == {"passed": 8}
    gutted = upload(served, sums(8))
    with served.jobs.database.write() as session:
        session.execute(text("DELETE FROM file_chunks WHERE file_id = :id"), {"id": gutted})
    answer = served.client.post("/v1/evaluations", json=request(gutted))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        410,
        "file_content_missing",
        "dataset.file_id",
    )


def test_a_model_that_goes_harms_only_its_own(served: Served) -> None:
    """`ghost` is registered and has no worker; then it comes back as another revision."""
    name = f"ghost-{time.time_ns()}"
    with served.jobs.database.write() as session:
        session.execute(
            text(
                "INSERT INTO models (name, card, tokenizer_files, tokenizer_hash) SELECT :name, "
                "jsonb_set(card, '{name}', to_jsonb(CAST(:name AS text))), tokenizer_files, tokenizer_hash "
                "FROM models WHERE name = 'vdiff-tiny'"
            ),
            {"name": name},
        )
    ghost = {**SLOW, "name": "ghost", "model": name}

    def known() -> Any:  # the API reads the list of models once a second
        answer = served.client.post(
            "/v1/evaluations", json=request(upload(served, sums(5)), FAST, ghost)
        )
        return answer.json() if answer.status_code == 201 else None

    made = eventually(known, what="the model is known")
    waiting = eventually(
        lambda: (
            (e := look(served, made["id"]))
            and of(e, "fast")["status"] == "completed"
            and of(e, "ghost")["waiting_for"]
            and e
        ),
        what="fast is done, ghost waits",
    )
    assert waiting["status"] == "in_progress" and name in of(waiting, "ghost")["waiting_for"]
    with served.jobs.database.write() as session:
        session.execute(
            text(
                "UPDATE models SET card = jsonb_set(card, '{revision}', '\"another\"') WHERE name = :name"
            ),
            {"name": name},
        )
    done = over(served, made["id"])
    assert done["status"] == "completed"
    assert (
        of(done, "ghost")["status"] == "failed"
        and of(done, "ghost")["error"]["code"] == "model_revision_changed"
    )
    assert of(done, "fast")["results"]["outcomes"] == {"passed": 5}
    # The same configuration on the new revision is another one, and says so in its name.
    again = served.client.post(
        f"/v1/evaluations/{made['id']}/configurations", json={"configurations": [ghost]}
    ).json()
    assert again["added"][0]["name"] == "ghost@another" and again["added"][0]["new_samples"] == 5
    served.client.post(f"/v1/evaluations/{made['id']}/cancel")
    over(served, made["id"])


def test_code_that_harms_spoils_only_its_own_item(served: Served) -> None:
    source = (
        "import os\n"
        "def grade(output, reference, item):\n"
        "    if reference == '6':\n        os.fork()\n"
        "    if reference == '7':\n        while True: pass\n"
        "    if reference == '8':\n        open('big', 'wb').write(b'x' * 2**30)\n"
        "    return output == reference"
    )
    graders = [{"type": "code", "name": "mine", "source": source, "timeout_seconds": 0.5}, *EXACT]
    made = begin(served, request(upload(served, sums(6)), graders=graders))
    done = over(served, made["id"])
    one = of(done, "fast")
    assert (done["status"], one["results"]["outcomes"]) == ("completed", {"error": 3, "passed": 3})
    assert (one["results"]["accuracy"]["mean"], one["results"]["accuracy"]["items"]) == (1.0, 3)
    assert {e["code"] for e in one["top_errors"]} == {"grader_failed", "grader_timeout"}
    first, second, third, *_ = items(served, made["id"])
    assert [i["graders"][0]["error"]["code"] for i in (first, second, third)] == [
        "grader_failed",
        "grader_timeout",
        "grader_failed",
    ]
    assert [g["passed"] for g in first["graders"]] == [None, True]


def test_an_item_that_cannot_run_is_said_and_the_rest_runs(served: Served) -> None:
    lines = sums(3)
    lines[1]["input"] = "What is 1 + 1? " * 400
    done = over(served, begin(served, request(upload(served, lines)))["id"])
    (bad,) = items(served, done["id"], outcome="error")
    assert (bad["item"], bad["error"]["code"], bad["job_id"]) == (
        2,
        "context_length_exceeded",
        None,
    )
    assert of(done, "fast")["results"]["outcomes"] == {"error": 1, "passed": 2}
