"""The README's commands, word for word, against a running server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Served

pytestmark = pytest.mark.integration
BLOCKS = re.findall(
    r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def blocks(language: str, word: str) -> list[str]:
    """The README's code blocks of a language that contain the word, in order."""
    return [code for kind, code in BLOCKS if kind == language and word in code]


def run(command: list[str], folder: Path, text: str | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env |= {"PYTHONPATH": str(ROOT), "VDIFF_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} {text}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shell(served: Served, code: str, job_id: str | None = None) -> str:
    code = code.replace("localhost:8000", served.url.removeprefix("http://"))
    if "JOB_ID" in code:
        assert job_id is not None
        code = code.replace("JOB_ID", job_id)
    return run(["sh", "-eu"], ROOT, code)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_lines(served: Served) -> None:
    submit, wait, follow, stream = blocks("sh", "curl")
    job = json.loads(shell(served, submit))
    assert job["object"] == "job" and job["id"].startswith("job_")
    done = json.loads(shell(served, wait, job["id"]))
    assert done["status"] == "succeeded"
    assert done["result"]["choices"][0]["message"]["content"] == "42"
    followed = shell(served, follow, job["id"])
    assert (
        "event: queued" in followed and "event: denoise" in followed and "event: done" in followed
    )
    chunks = [
        line.removeprefix("data: ")
        for line in shell(served, stream).splitlines()
        if line.startswith("data: ")
    ]
    assert chunks.pop() == "[DONE]"
    assert (
        "".join(json.loads(c)["choices"][0]["delta"].get("content", "") for c in chunks)
        == "1 2 5 9"
    )


def test_openai_package(served: Served, tmp_path: Path) -> None:
    (code,) = blocks("python", "OpenAI")
    said = run([sys.executable, "-c", code.replace("http://localhost:8000", served.url)], tmp_path)
    assert said.strip() == "stone river apple"


def test_python_client(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python", "vdiff.Client")
    monkeypatch.setenv("VDIFF_BASE_URL", served.url)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "['42', '1 2 5 9']"


def test_generate(tmp_path: Path) -> None:
    (line,) = blocks("sh", "vdiff generate")
    words = shlex.split(line)
    assert words[0] == ".venv/bin/vdiff"
    for name in ("vdiff", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)  # its output must not land in the checkout
    run([sys.executable, "-m", "vdiff", *words[1:]], tmp_path)
    answers = [
        json.loads(answer)
        for answer in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [answer["text"] for answer in answers] == [
        "42",
        "1 2 5 9",
        "7 + 5 = 12, 12 - 3 = 9. Answer: 9",
    ]


def test_every_block_is_accounted_for() -> None:
    """A block of commands that no test here and no make target runs is one that nobody knows to
    work.
    """
    tested = {
        *blocks("sh", "curl"),
        *blocks("python", "OpenAI"),
        *blocks("python", "vdiff.Client"),
        *blocks("sh", "vdiff generate"),
    }
    rest = [
        code.strip() for kind, code in BLOCKS if kind in ("sh", "python") and code not in tested
    ]
    assert rest == ["make up", "make test"]
