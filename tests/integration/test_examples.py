"""The examples, and the code of tutorial and how-tos, against a running server: what they print is
checked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.integration.conftest import ROOT, ApiProcess, Served, eventually
from tests.integration.test_webhooks import start_deliver
from vdiff.embedded.process import free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Stack:
    url: str
    client: httpx.Client
    receiver_port: int

    def run(self, command: list[str], folder: Path = ROOT, text: str | None = None) -> str:
        """Run a command and return its output; the addresses in `text` and the variables are this
        stack's.
        """
        env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
        env |= {"PYTHONPATH": str(ROOT), "VDIFF_BASE_URL": self.url}
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

    def here(self, code: str) -> str:
        """The page's code with this stack's addresses."""
        address = self.url.removeprefix("http://")
        return code.replace("localhost:8000", address).replace(
            "localhost:9000", f"127.0.0.1:{self.receiver_port}"
        )


@pytest.fixture(scope="module")
def stack(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The session's worker, behind an API that lets webhooks come here, as the tutorial starts it."""
    folder = tmp_path_factory.mktemp("examples")
    with ExitStack() as leaving:
        api = ApiProcess(served.jobs, folder / "api.log", webhook_allow_private="true")
        leaving.callback(api.end)
        process = start_deliver(served.jobs, folder / "deliver.log")
        leaving.callback(lambda: (process.kill(), process.wait()))
        api.wait_ready()
        client = leaving.enter_context(httpx.Client(base_url=api.url, timeout=60))
        yield Stack(api.url, client, free_port())


@pytest.fixture
def receiver(stack: Stack, tmp_path: Path) -> Iterator[Path]:
    """examples/webhook_receiver.py behind a registered endpoint; the file that it prints to."""
    endpoint = stack.client.post(
        "/v1/webhook_endpoints",
        json={
            "url": f"http://127.0.0.1:{stack.receiver_port}/hook",
            "events": ["job.succeeded", "job.failed"],
        },
    ).json()
    with running_receiver(stack, endpoint["secret"], tmp_path / "received.log") as log:
        yield log
    stack.client.delete(f"/v1/webhook_endpoints/{endpoint['id']}")


@contextmanager
def running_receiver(stack: Stack, secret: str, log: Path) -> Iterator[Path]:
    """The example as a process; the file that it prints to."""
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "examples.webhook_receiver:app",
        "--port",
        str(stack.receiver_port),
    ]
    env = {**os.environ, "WEBHOOK_SECRET": secret, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: "Uvicorn running" in log.read_text(), what="the receiver")
        yield log
    finally:
        process.kill()
        process.wait(10)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks, without the indent of lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (kind, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
        for indent, kind, code in _BLOCK.findall(text)
    ]


def checked(stack: Stack, page: str, folder: Path) -> list[str]:
    """Run each Python block of a page and compare what it prints with the `text` block behind it;
    the languages seen.
    """
    found = blocks(page)
    for (kind, code), (after, expected) in zip(found, [*found[1:], ("", "")], strict=True):
        if kind == "python" and after == "text":
            assert (
                stack.run([sys.executable, "-c", stack.here(code)], folder).splitlines()
                == expected.splitlines()
            )
    return [kind for kind, _ in found]


def test_curl(stack: Stack) -> None:
    submitted, answer = stack.run(["sh", "examples/curl.sh"]).splitlines()
    assert submitted.startswith("submitted job_") and answer == "42"


def test_openai_sdk(stack: Stack) -> None:
    careful, fast, streamed = stack.run([sys.executable, "examples/openai_sdk.py"]).splitlines()
    assert careful.startswith("low_confidence: '1 2 5 9' in ") and fast.startswith(
        "threshold: '1 2 5 9' in "
    )
    assert int(re.findall(r"\d+", fast)[-1]) < int(re.findall(r"\d+", careful)[-1])
    assert streamed == "1 2 5 9"


def test_openai_batch(stack: Stack) -> None:
    said = stack.run([sys.executable, "examples/openai_batch.py"]).splitlines()
    assert said == ["completed 3 of 3", "sum 42", "order 1 2 5 9", "words stone river apple"]


def test_requests(stack: Stack) -> None:
    said = stack.run([sys.executable, "examples/requests_jobs.py"]).splitlines()
    assert said[-3:] == ["succeeded 42", "succeeded 55", "succeeded 83"]
    assert said[0].startswith("step ") and all(
        re.match(r"step \d+ \d+:", line) for line in said[:-3]
    )


def test_bulk_evaluation(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUESTIONS", "8")
    careful, fast = stack.run([sys.executable, "examples/bulk_evaluation.py"]).splitlines()
    shape = re.compile(r"(.+): (\d+)% right \(\d+% to \d+%\), (\d+\.\d\d) tokens per forward")
    found = [shape.fullmatch(line) for line in (careful, fast)]
    assert all(found), (careful, fast)
    named = [match.groups() for match in found if match]
    assert [name for name, _, _ in named] == ["one per step", "threshold"]
    assert all(int(right) >= 75 for _, right, _ in named) and float(named[1][2]) > float(
        named[0][2]
    )


def test_notebook(stack: Stack, tmp_path: Path) -> None:
    """Its cells in order, in one process, as a notebook runs them."""
    notebook = json.loads((ROOT / "examples/denoising.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(
        notebook["cells"]
    )
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    said = stack.run([sys.executable, "-c", "\n\n".join(cells)], tmp_path).splitlines()
    assert "stone river apple" in said
    steps = [int(line.split(" steps")[0].split()[-1]) for line in said if " steps " in line]
    assert len(steps) == 3 and steps[0] > steps[1] >= steps[2]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), (
        "what it prints depends on who runs it"
    )


def test_webhook_receiver(stack: Stack, receiver: Path) -> None:
    url = f"http://127.0.0.1:{stack.receiver_port}/hook"
    assert httpx.post(url, content=b"{}").status_code == 401, "it must refuse what nobody signed"
    body = {"model": "vdiff-tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    job = stack.client.post(
        "/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": body}
    ).json()
    line = f"job.succeeded {job['id']} succeeded"
    eventually(lambda: line in receiver.read_text(), what="the event")
    (delivery,) = stack.client.get("/v1/deliveries", params={"job_id": job["id"]}).json()["data"]
    eventually(
        lambda: stack.client.get(
            "/v1/deliveries", params={"job_id": job["id"], "status": "delivered"}
        ).json()["data"]
    )
    stack.client.post(f"/v1/deliveries/{delivery['id']}/redeliver")
    got = '"POST /hook HTTP/1.1" 204'
    eventually(lambda: receiver.read_text().count(got) >= 2, what="the same event again")
    assert receiver.read_text().count(line) == 1, "what it has seen it drops"


def test_tutorial(stack: Stack, tmp_path: Path) -> None:
    found = [(kind, code) for kind, code in blocks("docs/tutorial.md") if kind != "text"]
    commands = [stack.here(code) for kind, code in found if kind == "sh"]
    assert commands.pop(0) == "VDIFF_WEBHOOK_ALLOW_PRIVATE=true make up\n"
    health, ask, submit, find, register, receive, deliveries = commands
    assert '"status":"ok"' in stack.run(["sh", "-eu"], text=health)
    answer = json.loads(stack.run(["sh", "-eu"], text=ask))
    assert answer["choices"][0]["message"]["content"] == "42" and answer["vdiff"]["forwards"] > 0
    job = json.loads(stack.run(["sh", "-eu"], text=submit))
    assert json.loads(stack.run(["sh", "-eu"], text=submit))["id"] == job["id"]
    stack.client.get(f"/v1/jobs/{job['id']}", params={"wait": 30})
    (listed,) = json.loads(stack.run(["sh", "-eu"], text=find))["data"]
    assert (listed["id"], listed["status"]) == (job["id"], "succeeded")
    endpoint = json.loads(stack.run(["sh", "-eu"], text=register))
    assert (
        receive
        == "WEBHOOK_SECRET=whsec_... .venv/bin/uvicorn examples.webhook_receiver:app --port 9000\n"
    )
    with running_receiver(stack, endpoint["secret"], tmp_path / "received.log") as log:
        assert checked(stack, "docs/tutorial.md", tmp_path).count("python") == 2
        eventually(
            lambda: (
                len(re.findall(r"^job\.succeeded job_\w+ succeeded$", log.read_text(), re.M)) >= 5
            )
        )
    sent = json.loads(stack.run(["sh", "-eu"], text=deliveries))["data"]
    assert len([d for d in sent if d["endpoint_id"] == endpoint["id"]]) >= 5
    stack.client.delete(f"/v1/webhook_endpoints/{endpoint['id']}")


@pytest.mark.parametrize(
    "page", ["docs/how-to/choose-a-rule.md", "docs/how-to/migrate-from-openai-batch.md"]
)
def test_how_to(stack: Stack, page: str, tmp_path: Path) -> None:
    assert "python" in checked(stack, page, tmp_path)


def test_the_receiver_of_the_page_is_the_example() -> None:
    (code,) = [code for kind, code in blocks("docs/how-to/receive-webhooks.md") if kind == "python"]
    assert code == (ROOT / "examples/webhook_receiver.py").read_text(encoding="utf-8")
