"""The command line against a real server, as scripts use it: what it prints, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.integration.conftest import ROOT, Served, eventually
from vdiff.cli import main

pytestmark = pytest.mark.integration

_KEYS = text("SELECT idempotency_key FROM jobs WHERE idempotency_key LIKE '%cli-detach%'")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vdiff(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command here: (exit code, stdout, stderr)."""
    monkeypatch.setenv("VDIFF_BASE_URL", served.url)

    def run(*args: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vdiff", *args])
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err  # no terminal, no control codes
        return int(ended.value.code or 0), out, err

    return run


def test_one_prompt(vdiff: Run) -> None:
    assert vdiff("submit", "What is 17 + 25?", "--wait", "--temperature", "0")[:2] == (0, "42\n")
    code, out, err = vdiff(
        "submit", "-", "--set", "temperature=0", "--metadata", "cli=one", stdin="What is 1 + 2?"
    )
    job_id = out.strip()
    assert code == 0 and job_id.startswith("job_") and f"vdiff jobs get {job_id} --wait" in err
    code, out, _ = vdiff("jobs", "get", job_id, "--wait", "--json")
    assert code == 0 and json.loads(out)["result"]["choices"][0]["message"]["content"] == "3"
    code, out, _ = vdiff("jobs", "get", job_id)
    assert "status    succeeded\n" in out and out.endswith("\n3\n")
    code, out, _ = vdiff("jobs", "list", "--metadata", "cli=one")
    assert [line.split()[:3] for line in out.splitlines()][1:] == [
        [job_id, "succeeded", "vdiff-tiny"]
    ]
    code, out, _ = vdiff("jobs", "watch", job_id)
    assert (code, out.splitlines()[0]) == (0, "queued") and "started on worker_" in out
    code, out, _ = vdiff("jobs", "watch", job_id, "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "done"
    code, out, _ = vdiff("jobs", "replay", job_id)
    replayed = out.split()[0]
    code, out, _ = vdiff("jobs", "get", replayed, "--wait", "--json")
    assert json.loads(out)["replay"]["same_text"] is True
    code, out, err = vdiff("jobs", "retry", job_id, "job_none")
    assert code == 1 and "final" in err and "job_none" in err


def test_what_is_refused_has_a_code(vdiff: Run) -> None:
    code, _, err = vdiff(
        "submit", "hi", "--algorithm", "threshold", "--set", "diffusion.threshold=7"
    )
    assert code == 2 and "diffusion.threshold" in err and len(err.splitlines()) == 1
    assert vdiff("jobs", "get", "job_none")[0] == 5
    assert vdiff("submit", "hi", "--model", "no-such-model")[0] == 5
    assert vdiff("jobs", "list", "--status", "nope")[0] == 2


def test_a_job_that_is_stopped(served: Served, vdiff: Run) -> None:
    served.worker.signal(signal.SIGSTOP)
    try:
        _, out, _ = vdiff("submit", "What is 17 + 25?", "--json")
        job_id = json.loads(out)["id"]
        code, _, err = vdiff("jobs", "get", job_id, "--wait", "--timeout", "0.2")
        assert code == 6 and "it goes on" in err
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")} | {
            "VDIFF_BASE_URL": served.url
        }
        waiting = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vdiff",
                "submit",
                "--file",
                "-",
                "--wait",
                "--idempotency-key",
                "cli-detach",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        assert waiting.stdin is not None
        waiting.stdin.write("What is 3 + 4?\n")
        waiting.stdin.close()
        waiting.stdin = None

        def accepted() -> bool:
            return "cli-detach" in str(served.jobs.execute(_KEYS))

        eventually(accepted, seconds=60)
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate(timeout=120)
        assert (
            waiting.returncode == 130
            and "--idempotency-key cli-detach" in err
            and "Traceback" not in err
        )
        code, out, _ = vdiff("jobs", "cancel", job_id)
        assert code == 0 and job_id in out
    finally:
        served.worker.signal(signal.SIGCONT)
    assert vdiff("jobs", "get", job_id, "--wait")[0] == 1
    code, out, _ = vdiff(
        "submit",
        "--file",
        "-",
        "--wait",
        "--idempotency-key",
        "cli-detach",
        stdin="What is 3 + 4?\n",
    )
    assert (code, out) == (0, "7\n")
    assert (
        len([row for row in served.jobs.execute(_KEYS) if "cli-detach" in str(row)]) == 1
    )  # not paid twice


def test_many_jobs_are_cancelled(served: Served, vdiff: Run) -> None:
    """Jobs that a filter finds, and named jobs, past one that does not exist and one that is over."""
    over = vdiff("submit", "What is 1 + 1?", "--metadata", "cli=many")[1].strip()
    assert vdiff("jobs", "get", over, "--wait")[0] == 0
    served.worker.signal(signal.SIGSTOP)
    try:
        made = [
            vdiff("submit", f"What is {i} + 1?", "--metadata", "cli=many")[1].strip()
            for i in range(4)
        ]
        code, out, err = vdiff("jobs", "cancel", made[0], "job_none", over)
        assert (
            code == 5 and out.split()[0] == made[0] and out.splitlines()[1] == f"{over} succeeded"
        )
        assert (
            "job_none" in err and "3 jobs: " in err and "1 refused" in err and "1 succeeded" in err
        )
        code, out, err = vdiff("jobs", "cancel", "--metadata", "cli=many")
        assert (code, {line.split()[0] for line in out.splitlines()} - set(made[:1])) == (
            0,
            set(made[1:]),
        )
    finally:
        served.worker.signal(signal.SIGCONT)
    for job in made:
        assert vdiff("jobs", "get", job, "--wait")[0] == 1
    assert vdiff("jobs", "cancel", "--metadata", "cli=many") == (0, "", "no such jobs\n")
    code, out, _ = vdiff("jobs", "get", made[1])
    assert out.count("cancelled") == 1


def test_a_file_of_prompts(vdiff: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '"What is 17 + 25?"\n{"prompt": ""}\n[{"role": "user", "content": "Sort the numbers: 5 2 9 1"}]\n'
    )
    code, out, err = vdiff(
        "submit", "--file", str(prompts), "--wait", "--json", "--temperature", "0"
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [line["text"] for line in lines] == ["42", None, "1 2 5 9"]
    assert (
        lines[1]["error"]["param"] == "prompt"
        and "1 of 3 failed" in err
        and "prompts: 3/3, 1 failed" in err
    )
    answers = tmp_path / "answers.txt"
    code, out, err = vdiff(
        "submit", "--file", str(prompts), "--wait", "--output", str(answers), "--temperature", "0"
    )
    assert answers.read_text() == "42\n\n1 2 5 9\n" and out == ""
    code, out, err = vdiff(
        "submit", "--file", str(ROOT / "examples" / "prompts.jsonl"), "--wait", "--json"
    )
    lines = [json.loads(line) for line in out.splitlines()]  # a file of `vdiff generate`
    assert code == 0 and [line["custom_id"] for line in lines] == ["sum", "sort", "story"], err
    code, out, err = vdiff("submit", "--file", str(prompts))
    assert code == 1 and len(out.splitlines()) == 2 and "prompt 2: " in err


def lines_of(count: int, **body: Any) -> str:
    messages = [[{"role": "user", "content": f"What is {i} + 1?"}] for i in range(count)]
    return "".join(
        json.dumps(
            {
                "custom_id": f"a-{i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "vdiff-tiny", "messages": messages[i], "temperature": 0, **body},
            }
        )
        + "\n"
        for i in range(count)
    )


def test_batches(vdiff: Run, tmp_path: Path) -> None:
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text(lines_of(5))
    code, out, err = vdiff("batch", "submit", str(requests), "--wait", "--output", str(results))
    assert code == 0 and "status    completed, all_succeeded" in out and "lines: 5/5" in err
    batch_id = out.split()[1]
    written = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["custom_id"] for line in written] == [f"a-{i}" for i in range(5)]
    assert vdiff("batch", "results", batch_id, "--text")[1].splitlines()[3] == "a-3\t4"
    assert vdiff("batch", "results", batch_id, "--status", "failed")[1] == ""
    assert json.loads(vdiff("batch", "get", batch_id, "--json")[1])["status"] == "completed"
    assert batch_id in vdiff("batch", "list")[1]
    assert vdiff("batch", "retry", batch_id)[0] == 1  # nothing failed
    assert vdiff("batch", "cancel", "batch_none")[0] == 5

    requests.write_text(lines_of(2, max_tokens=-1))
    code, out, _ = vdiff("batch", "submit", str(requests), "--wait")
    assert code == 1 and "status    failed" in out and "line 1: " in out and "max_tokens" in out


class OnTerminal:
    """`vdiff ...` on a terminal of its own, as a person starts it; what it draws is in `screen`."""

    def __init__(self, served: Served, *arguments: str) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
        env |= {
            "VDIFF_BASE_URL": served.url,
            "TERM": "xterm-256color",
            "COLUMNS": "160",
            "LINES": "40",
        }
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vdiff", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(theirs)
        self.screen = ""

    def shows(self, words: str, seconds: float = 60.0) -> None:
        """Read until they are there."""
        deadline = time.monotonic() + seconds
        while words not in self.screen:
            assert time.monotonic() < deadline, self.screen[-2000:]
            if select.select([self._ours], [], [], 0.2)[0]:
                self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65_536)
        except OSError:  # its other end was closed
            return False
        self.screen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        return bool(data)

    def types(self, line: str) -> None:
        os.write(self._ours, line.encode() + b"\n")

    def interrupt(self) -> int:
        """Ctrl-C; its exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(240)
        while select.select([self._ours], [], [], 0)[0] and self._read():
            pass
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._ours)


def test_ctrl_c_detaches_and_says_how_to_come_back(
    served: Served, vdiff: Run, tmp_path: Path
) -> None:
    """On a terminal, with a bar that has rate, time left and errors so far."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text(lines_of(20))
    served.worker.signal(signal.SIGSTOP)
    opened: list[OnTerminal] = []
    try:
        _, out, _ = vdiff("batch", "submit", str(requests), "--json")
        batch_id = json.loads(out)["id"]
        code, _, err = vdiff("batch", "get", batch_id, "--wait", "--timeout", "0.2")
        assert code == 6 and "it goes on" in err
        _, out, _ = vdiff("submit", "What is 17 + 25?", "--json")
        job_id = json.loads(out)["id"]
        opened = [
            OnTerminal(served, "batch", "get", batch_id, "--wait"),
            OnTerminal(served, "batch", "submit", str(requests), "--wait"),
            OnTerminal(served, "jobs", "watch", job_id),
            OnTerminal(served, "batch", "get", batch_id, "--wait"),
        ]
        got, submitted, watched, stays = opened
        got.shows("0/20")
        submitted.shows("0/20")
        watched.shows("queued")
        stays.shows("0/20")
        assert [terminal.interrupt() for terminal in opened[:3]] == [130, 130, 130]
        for terminal, come_back in (
            (got, f"vdiff batch get {batch_id} --wait"),
            (watched, f"vdiff jobs watch {job_id}"),
        ):
            assert f"it goes on. Come back with: {come_back}" in terminal.screen
        assert "Come back with: vdiff batch get batch_" in submitted.screen
        assert not any("Traceback" in terminal.screen for terminal in opened)
        assert served.client.get(f"/v1/batches/{batch_id}").json()["status"] in (
            "validating",
            "in_progress",
        )
        served.worker.signal(signal.SIGCONT)
        stays.shows("all_succeeded")
        assert re.search(r"20/20 +[0-9.]+/s +ETA ", stays.screen), stays.screen
        assert stays.process.wait(240) == 0
    finally:
        served.worker.signal(signal.SIGCONT)
        for terminal in opened:
            terminal.close()
    for batch in served.client.get("/v1/batches").json()["data"]:
        if batch["status"] not in ("completed", "failed"):
            assert vdiff("batch", "get", batch["id"], "--wait")[0] == 0


def test_ids_on_a_terminal_have_lines_of_their_own(served: Served, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"What is 17 + 25?"\n{"prompt": ""}\n' * 4)
    terminal = OnTerminal(served, "submit", "--file", str(prompts))
    try:
        terminal.shows("prompt 8: ")
        assert terminal.process.wait(240) == 1
    finally:
        terminal.close()
    lines = terminal.screen.replace("\r", "\n").split("\n")
    ids = [line for line in lines if "job_" in line]
    assert len(ids) == 4 and all(re.fullmatch(r"job_[a-z0-9]+", line) for line in ids), (
        terminal.screen
    )
    assert len([line for line in lines if re.match(r"prompt \d: ", line)]) == 4


def test_models_and_a_chat_without_a_terminal(vdiff: Run) -> None:
    code, out, _ = vdiff("models")
    assert (
        code == 0
        and out.splitlines()[1].split()[:3] == ["vdiff-tiny", "1", "4"]
        and "threshold" in out
    )
    lines = vdiff("models", "--json")[
        1
    ].splitlines()  # an object a line; other tests of this server may have added models
    assert json.loads(lines[0])["id"] == "vdiff-tiny"
    code, out, err = vdiff(
        "chat", "--temperature", "0", stdin="What is 17 + 25?\n/new\nSort the numbers: 5 2 9 1\n"
    )
    assert (code, out, err) == (0, "42\n1 2 5 9\n", "")
    code, out, err = vdiff(
        "chat", "--temperature", "0", "--json", stdin="What is 17 + 25?\n/what\nWhat is 1 + 2?\n"
    )
    first, second = [json.loads(line) for line in out.splitlines()]
    assert (
        code == 0
        and first["result"]["choices"][0]["message"]["content"] == "42"
        and "/new begins anew" in err
    )
    assert (
        second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    )  # the first turn is part of it
    code, out, err = vdiff("chat", "--set", "temperature=9", stdin="What is 17 + 25?\n")
    assert (code, out) == (1, "") and "temperature" in err


def test_a_chat_on_a_terminal(served: Served) -> None:
    """Ctrl-C stops an answer and cancels its job; the conversation goes on without it."""
    chat = OnTerminal(served, "chat", "--temperature", "0")
    try:
        chat.shows(f"{served.url}: /new begins anew")
        served.worker.signal(signal.SIGSTOP)
        chat.types("What is 1 + 1?")
        chat.shows("queued, waiting for a worker")
        chat.process.send_signal(signal.SIGINT)
        chat.shows("stopped")
        stopped = served.client.get("/v1/jobs", params={"limit": 1}).json()["data"][0]
        assert stopped["status"] == "cancelled" or stopped["cancel_requested"]
        served.worker.signal(signal.SIGCONT)
        chat.types("What is 17 + 25?")
        chat.shows(" tokens in ")
        assert "\r42\r\n" in chat.screen
        chat.types("/quit")
        assert chat.process.wait(240) == 0
    finally:
        served.worker.signal(signal.SIGCONT)
        chat.close()
    (last,) = served.jobs.execute(
        text("SELECT body->'messages' FROM jobs ORDER BY created_at DESC LIMIT 1")
    )
    assert [message["content"] for message in last[0]] == ["What is 17 + 25?"]
