"""`vdiff eval`, the Python client and the page's worked example, against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.integration.conftest import ROOT, Served, eventually
from tests.integration.test_evaluations import look, over, sums
from vdiff import AsyncClient, Client
from vdiff.cli import app
from vdiff.cli.exits import exit_code
from vdiff.embedded.process import free_port

pytestmark = pytest.mark.integration
FAST = "max_tokens: 16\ndiffusion: {algorithm: threshold, threshold: 0.9}\n"


@pytest.fixture
def folder(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, the server in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDIFF_BASE_URL", served.url)
    return tmp_path


def vdiff(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_run_compare_report_list(folder: Path, served: Served) -> None:
    data = write(folder / "sums.jsonl", sums(10, wrong=1))
    (folder / "fast.yaml").write_text(FAST)
    (folder / "others.yaml").write_text(
        "- {name: slow, max_tokens: 8}\n- {name: again, max_tokens: 8, seed: 5}\n"
    )
    ran = vdiff(
        "run",
        data,
        "--config",
        "fast.yaml",
        "--config",
        "others.yaml",
        "--grader",
        "number",
        "--json",
    )
    assert "configurations[2]: configurations[1] asks for the same" in str(ran.exception)
    (folder / "fast.yaml").write_text(FAST + 'name: "[/red]fast"\n')  # no markup, in no table
    ran = vdiff(
        "run",
        data,
        "--config",
        "fast.yaml",
        "--grader",
        "number",
        "--name",
        "sums [/bold]",
        "--json",
    )
    assert ran.exit_code == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert (made["name"], made["status"]) == ("sums [/bold]", "completed")
    shown = vdiff("run", data, "--config", "fast.yaml", "--grader", "number")
    assert shown.exit_code == 0 and "was there; 0 answers are new" in shown.stderr
    assert (
        "[/red]fast" in shown.stdout
        and "90.0%" in shown.stdout
        and "59.6% to 98.2%" in shown.stdout
    )
    assert vdiff("show", made["id"]).stdout == shown.stdout
    compared = vdiff("compare", f"{made['id']}/[/red]fast", f"{made['id']}/[/red]fast")
    assert compared.exit_code == 0 and "difference: +0.0 points" in compared.stdout
    report = vdiff("report", made["id"])
    assert report.stdout.strip() == f"{made['id']}.html"
    assert (folder / f"{made['id']}.html").read_text().startswith("<!doctype html>")
    assert (
        "fast | 90.0% |"
        in vdiff("report", made["id"], "--format", "markdown", "--output", "-").stdout
    )
    assert made["id"] in [e["id"] for e in json.loads(vdiff("list", "--json").stdout)]
    assert re.search(r"sums \[/bold\] +completed +10/10 +\[/red\]fast", vdiff("list").stdout)
    assert vdiff("wait", made["id"], "--timeout", "60", "--base-url", served.url).exit_code == 0


def test_the_other_options_of_every_client_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody there is one line that says what to do, as of all commands that need a server."""
    nobody = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "vdiff",
        "eval",
        "list",
        "--base-url",
        nobody,
        "--api-key",
        "x",
    ]
    ran = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, len(ran.stderr.splitlines())) == (
        3,
        1,
    ) and "is a server running?" in ran.stderr


@pytest.mark.parametrize(
    "files,arguments,says",
    [
        ({"a.yaml": "max_tokens: [\n"}, ["--config", "a.yaml"], "a.yaml, line 2"),
        ({"a.yaml": "just text"}, ["--config", "a.yaml"], "a configuration is a mapping"),
        ({}, ["--config", "none.yaml"], "none.yaml: No such file"),
        ({"t.yaml": "colour: red"}, ["--task", "t.yaml"], "template, graders, endpoint"),
        ({}, ["--template", "{{question}}"], "line 1: there is no column 'question'"),
        ({"a.yaml": "max_tokens: 0"}, ["--config", "a.yaml"], "configurations[0] (a): max_tokens"),
        ({}, ["--grader", "guess"], "graders[0].type"),
    ],
)
def test_mistakes_are_one_line_that_says_which(
    folder: Path, files: dict[str, str], arguments: list[str], says: str
) -> None:
    for name, content in files.items():
        (folder / name).write_text(content)
    data = write(folder / "data.jsonl", sums(2))
    command = [sys.executable, "-m", "vdiff", "eval", "run", str(data), *arguments]
    ran = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1), ran.stderr
    assert ran.stderr.startswith("vdiff: ") and says in ran.stderr


def test_ctrl_c_lets_it_go_on_and_says_how_to_come_back(folder: Path, served: Served) -> None:
    data = write(folder / "long.jsonl", sums(300))
    command = [sys.executable, "-m", "vdiff", "eval", "run", str(data)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            found = eventually(
                lambda: [
                    e
                    for e in served.client.get("/v1/evaluations").json()["data"]
                    if e["name"] == "long"
                ],
                seconds=40,
                what="it began",
            )
            made = found[0]["id"]
            eventually(lambda: look(served, made)["progress"]["graded"], what="the first grades")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == 130 and f"vdiff eval wait {made}" in said
    assert look(served, made)["status"] == "in_progress"
    timed_out = vdiff("wait", made, "--timeout", "0.1").exception
    assert isinstance(timed_out, Exception) and exit_code(timed_out) == 6
    assert vdiff("cancel", made).exit_code == 0
    ended = over(served, made)
    assert ended["status"] == "cancelled"
    so_far = f"{ended['progress']['graded']} of {ended['progress']['total']}"
    shown = vdiff("show", made)
    assert (
        f"{made} cancelled, {so_far} answered" in shown.stderr
        and f"default (cancelled, {so_far})" in shown.stdout
    )


def test_the_worked_example_of_the_page(
    folder: Path, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "evaluations.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)[:1]
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:1]
    (folder / "questions.jsonl").write_text(lines)
    exec(
        compile(code.replace("http://localhost:8000", served.url), "docs/evaluations.md", "exec"),
        {},
    )
    said = capsys.readouterr().out
    assert (
        "careful: 100.0% (34.2% to 100.0%)" in said
        and "fast: 100.0%" in said
        and "difference +0.0%, p = 1" in said
    )


async def test_the_client_in_both_ways(folder: Path, served: Served) -> None:
    content = write(folder / "c.jsonl", sums(4)).read_bytes()
    body: dict[str, Any] = {
        "template": "{{input}}",
        "graders": [{"type": "exact"}],
        "configurations": [{"name": "a", "model": "vdiff-tiny", "max_tokens": 8}],
    }
    with Client() as client:
        made = client.create_evaluation(
            client.upload(content, purpose="evals", name="c.jsonl"), limit=3, **body
        )
        done = client.wait_evaluation(made, poll_seconds=0.2)
        assert (done.ok, done.items, done.progress) == (True, 3, {"total": 3, "graded": 3})
        assert [i.outcome for i in client.evaluation_items(done)] == ["passed"] * 3
    async with AsyncClient() as client:
        more = await client.add_configurations(done, [{**body["configurations"][0], "repeats": 2}])
        assert more.added is not None and more.added[0]["new_samples"] == 3
        done = await client.wait_evaluation(done, poll_seconds=0.2)
        assert [i.seed async for i in client.evaluation_items(done, configuration="a")]
        assert (await client.compare_configurations((done, "a"), (done.id, "a")))["difference"] == 0
        await client.delete_evaluation(done)
        assert done.id not in [e.id async for e in client.list_evaluations()]
