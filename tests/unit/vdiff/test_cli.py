"""The command line without a server: what is read from it, exit codes, and that help and its
examples are true.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from rich.console import Console

from shared.errors import ConfigurationError, InvalidParameter, NotFound
from vdiff import client as module
from vdiff.cli import app, exits, main
from vdiff.cli.canvas import Canvas
from vdiff.cli.connect import fields_of, pairs, prompts_of
from vdiff.cli.jobs import lines_of, show
from vdiff.cli.output import Listing, write
from vdiff.client import Event

NONE: dict[str, Any] = {"max_tokens": None, "temperature": None, "seed": None, "algorithm": None}


def test_fields_of_a_request() -> None:
    given = [
        "diffusion.threshold=0.9",
        'stop=["a"]',
        "user=me",
        "diffusion.apd.kv_window=4",
        "ignore_eos=true",
    ]
    assert fields_of(given, **{**NONE, "max_tokens": 8, "algorithm": "threshold"}) == {
        "max_tokens": 8,
        "stop": ["a"],
        "user": "me",
        "ignore_eos": True,
        "diffusion": {"algorithm": "threshold", "threshold": 0.9, "apd": {"kv_window": 4}},
    }
    for bad in ("threshold", "=1"):
        with pytest.raises(InvalidParameter, match="NAME=VALUE"):
            fields_of([bad], **NONE)
    with pytest.raises(InvalidParameter, match="NAME=VALUE"):
        fields_of(["diffusion.=1"], **NONE)
    with pytest.raises(InvalidParameter, match="no object"):
        fields_of(["seed=1", "seed.x=2"], **NONE)
    assert pairs(["a=b=c"], "--metadata") == {"a": "b=c"}


def test_prompts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text('one\r\n\n{"two\u2028"\n', encoding="utf-8")
    assert prompts_of(plain) == ["one", '{"two\u2028"']
    lines.write_text('"one"\n{"prompt": "two"}\n[{"role": "user", "content": "three"}]\n')
    assert prompts_of(lines) == ["one", {"prompt": "two"}, [{"role": "user", "content": "three"}]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from stdin\n")))
    assert prompts_of(Path("-")) == ["from stdin"]
    lines.write_text('"one"\n7\n')
    with pytest.raises(InvalidParameter, match="line 2: a text"):
        prompts_of(lines)
    lines.write_text("{\n")
    with pytest.raises(InvalidParameter, match="line 1: no JSON"):
        prompts_of(lines)
    plain.write_text("\n")
    with pytest.raises(InvalidParameter, match="no prompts"):
        prompts_of(plain)
    with pytest.raises(InvalidParameter, match="No such file"):
        prompts_of(tmp_path / "none")


def run(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["vdiff", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("jobs", "list", "--base-url", "http://127.0.0.1:1"), 3, "is a server running?"),
        (("jobs", "list", "--base-url", "nonsense"), 2, "base_url must be like"),
        (("jobs", "list", "--base-url", "http://[::1"), 2, "base_url must be like"),
        (("jobs", "list", "--base-url", "http://host:port"), 2, "base_url must be like"),
        (("jobs", "list", "--base-url", "http://a..b"), 2, "base_url must be like"),
        (("jobs", "list", "--limit", "0"), 2, "--limit"),
        (("jobs", "list", "--metadata", "x"), 2, "--metadata takes NAME=VALUE"),
        (("submit",), 2, "give a prompt"),
        (("submit", "a", "--file", "b"), 2, "give a prompt"),
        (("submit", "a", "--output", "b"), 2, "--output is for"),
        (("submit", "a", "--timeout", "3"), 2, "--timeout is for"),
        (
            ("submit", "--file", "-", "--wait", "--output", "/nowhere/x"),
            2,
            "/nowhere/x: No such file",
        ),  # nothing was asked yet
        (
            ("batch", "submit", "-", "--wait", "--output", "/nowhere/x"),
            2,
            "/nowhere/x: No such file",
        ),
        (
            ("batch", "get", "batch_1", "--wait", "--output", "/nowhere/x"),
            2,
            "/nowhere/x: No such file",
        ),
        (("jobs", "get", "job_1", "--timeout", "3"), 2, "--timeout needs --wait"),
        (
            ("eval", "run", "vdiff-tiny", "--detach", "--timeout", "3"),
            2,
            "--timeout is for waiting",
        ),
        (("eval", "report", "eval_1", "--output", "-", "--open"), 2, "--open shows a file"),
        (("submit", "--file", "x", "--custom-id", "y"), 2, "--custom-id is for"),
        (("submit", "a", "--set", "x"), 2, "--set takes"),
        (("submit", "a", "--set", "diffusion.=3"), 2, "--set takes"),
        (("jobs", "cancel"), 2, "give ids of jobs, or --status"),
        (("jobs", "cancel", "job_1", "--model", "m"), 2, "give ids of jobs, or --status"),
        (("jobs", "cancel", "--status", "failed"), 2, "--status must be queued or running"),
        (("batch", "submit", "/nowhere/x.jsonl"), 2, "No such file"),
        (("batch", "submit", "x", "--output", "y"), 2, "need --wait"),
        (("batch", "results", "batch_x", "--text", "--output", "y"), 2, "as JSON"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_code(
    args: tuple[str, ...],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*args, monkeypatch=monkeypatch) == code
    out, err = capsys.readouterr()
    assert said in err and out == "" and "Traceback" not in err


HTML = b"<html><body>It works</body></html>"


@pytest.fixture
def another(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is no vdiff: it answers everything with (status, content type,
    body, Location).
    """
    status, kind, body, to = request.param

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *to):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("another", "code", "said"),
    [
        ((200, "text/html", HTML, ()), 3, "that is not a vdiff server"),
        ((404, "text/html", HTML, ()), 3, "that is not a vdiff server"),
        ((200, "application/json", b'{"hello": 1}', ()), 3, "that is not a vdiff server"),
        (
            (200, "application/json", b'{"version": "0.9"}', ()),
            3,
            "that is not a vdiff server",
        ),  # as vLLM answers
        ((200, "application/json", b"[1, 2", ()), 3, "that is not a vdiff server"),
        (
            (200, "application/json", b"{}", [("Content-Encoding", "gzip")]),
            3,
            "that is not a vdiff server",
        ),
        (
            (301, "text/html", b"", [("Location", "https://elsewhere.example/")]),
            3,
            "redirects to https://elsewhere.example/",
        ),
        ((502, "text/html", HTML, ()), 3, "502 Bad Gateway, not as vdiff does; a proxy"),
        ((401, "text/plain", b"no", ()), 4, "VDIFF_API_KEY"),
    ],
    indirect=["another"],
)
@pytest.mark.parametrize(
    "command",
    [
        "models",
        "jobs list",
        "submit hi --wait",
        "batch list",
        "eval list",
        "eval report eval_1 --output -",
        "chat",
    ],
)
def test_something_else_answers(
    another: str,
    code: int,
    said: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that says so and where the right address is given; never a traceback."""
    assert run(*command.split(), "--base-url", another, monkeypatch=monkeypatch) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err
    assert code == 4 or "VDIFF_BASE_URL or --base-url" in err


def test_who_waits_for_a_limit_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Once, however many of a file's prompts wait at the same time."""
    job = {
        "id": "job_1",
        "object": "job",
        "status": "succeeded",
        "done": True,
        "result": {"choices": [{"text": "42"}]},
    }
    barrier = threading.Barrier(3)
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/version":
            return httpx.Response(200, json={"server": "vdiff", "version": "1"})
        asked.append(request.headers["idempotency-key"])
        if asked.count(asked[-1]) > 1:
            return httpx.Response(200, json=job)
        barrier.wait(30)
        error = {"message": "60 requests a minute are allowed", "code": "rate_limit_exceeded"}
        return httpx.Response(429, json={"error": error}, headers={"Retry-After": "30"})

    monkeypatch.setattr(
        httpx.Client, "_init_transport", lambda *_, **__: httpx.MockTransport(answer)
    )
    monkeypatch.setattr("vdiff.client.sync_client.sleep", lambda _: None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    assert (
        run("submit", "--file", str(prompts), "--model", "m", "--wait", monkeypatch=monkeypatch)
        == 0
    )
    out, err = capsys.readouterr()
    assert (
        out == "42\n42\n42\n" and err.count("waiting 30 s: 60 requests a minute are allowed\n") == 1
    )


def test_exit_codes() -> None:
    def api(kind: type[module.ApiError], status: int) -> module.ApiError:
        return kind("x", status=status)

    job = module.Job.of({"id": "job_1", "object": "job", "status": "failed"})
    assert str(module.JobFailed(job)) == "job_1 failed: no result"
    error = {"code": "cancelled", "message": "the job was cancelled"}
    cancelled = module.Job.of(
        {"id": "job_1", "object": "job", "status": "cancelled", "error": error}
    )
    assert str(module.JobFailed(cancelled)) == "job_1 cancelled"  # once
    assert [
        exits.exit_code(exc)
        for exc in (
            module.JobFailed(job),
            module.BadRequest("x", status=400),
            module.ServerUnreachable("x", sent=False),
            api(module.ServerError, 503),
            api(module.AuthenticationFailed, 401),
            api(module.PermissionDenied, 403),
            api(module.RateLimited, 429),
            api(module.NotFound, 404),
            api(module.Gone, 410),
            module.WaitTimeout("x"),
            api(module.Conflict, 409),
            ConfigurationError("x"),
            NotFound("x"),
        )
    ] == [1, 2, 3, 3, 4, 4, 4, 5, 5, 6, 1, 2, 5]
    assert set(exits.MEANINGS) == {0, 1, 2, 3, 4, 5, 6, 130}


def commands() -> Iterator[tuple[str, Any]]:
    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, inner in command.commands.items():
            if hasattr(inner, "commands"):
                yield from below(inner, f"{path} {name}")
            else:
                yield f"{path} {name}", inner

    yield from below(typer.main.get_command(app), "vdiff")


def examples() -> list[tuple[str, str]]:
    found = []
    for name, command in commands():
        _, _, shown = (command.epilog or "").partition("Examples:\n")
        found += [(name, line.strip()) for line in shown.splitlines()]
    return found


@pytest.mark.parametrize(("name", "line"), examples())
def test_examples_of_the_help_are_commands_that_exist(name: str, line: str) -> None:
    words = shlex.split(re.sub(r"\S*\$\((.*?)\)", r"\1 >", line))  # the command inside of $(...)
    assert "vdiff" in words
    words = words[words.index("vdiff") + 1 :]
    end = next((i for i, word in enumerate(words) if word in ("|", ">")), len(words))
    command: Any = typer.main.get_command(app)
    rest = words[:end]
    path = "vdiff"
    while hasattr(command, "commands"):
        path, command = f"{path} {rest[0]}", command.commands[rest.pop(0)]
    command.make_context(path, rest)  # reads every option and argument, or raises
    assert name.split()[1] == path.split()[1]


def test_every_client_command_has_examples_and_json() -> None:
    with_examples = {name for name, _ in examples()}
    for name, command in commands():
        if name.split()[1] in (
            "jobs",
            "submit",
            "batch",
            "chat",
            "models",
            "doctor",
            "eval",
            "keys",
            "generate",
            "bench",
            "config",
            "usage",
        ):
            assert name in with_examples
            options = {option for parameter in command.params for option in parameter.opts}
            assert "--json" in options or name in ("vdiff batch results", "vdiff eval report")


def test_help_keeps_its_examples_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("submit", "--help", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert '    vdiff submit "What is 17 + 25?" --wait\n' in text and "\x1b" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    """The script is there for each shell, and asked with a beginning it completes."""
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="vdiff", complete_var="_VDIFF_COMPLETE", shell=shell)
    assert "_VDIFF_COMPLETE" in script


def test_completion_completes() -> None:
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("VDIFF_")}
    env |= {"_VDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "vdiff jo", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['vdiff']; from vdiff.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["jobs"], done.stderr


def progress(**data: Any) -> Event:
    usual = {
        "index": 0,
        "step": 1,
        "tokens_committed": 1,
        "tokens_total": 4,
        "offset": 0,
        "text": "",
        "canvas": None,
    }
    return Event("1-0", "progress", usual | data)


def test_the_canvas_tells_committed_from_proposed() -> None:
    canvas = Canvas()
    canvas.hear(progress(text="He", canvas="Hello\u2591\u2591"))
    text = canvas.text(0)
    assert text.plain == "Hello\u2591\u2591"
    assert [(text.plain[s.start : s.end], str(s.style)) for s in text.spans if s.style] == [
        ("llo\u2591\u2591", "dim")
    ]
    canvas.hear(progress(offset=2, text="y!", canvas="Hey!"))
    assert canvas.text(0).plain == "Hey!" and not [
        s for s in canvas.text(0).spans if "dim" in str(s.style) and s.end > s.start
    ]
    canvas.hear(
        Event(
            "2-0",
            "done",
            {"result": {"choices": [{"index": 0, "message": {"content": "Hey [b]you[/b]"}}]}},
        )
    )
    out = io.StringIO()
    Console(file=out, width=80).print(canvas)
    assert out.getvalue() == "Hey [b]you[/b]\n"


def test_a_watched_job_as_lines() -> None:
    events = [
        Event("0-0", "queued", {}),
        Event("1-0", "started", {"worker_id": "w", "attempt": 1}),
        progress(),
        progress(text="a\nb", step=2, tokens_committed=2),
        Event("3-0", "done", {}),
    ]
    assert list(lines_of(iter(events))) == [
        "queued",
        "started on w, attempt 1",
        "step 2, 2/4: 'a\\nb'",
    ]


def test_listings_keep_ids_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = "job_01m8876xjcpazb6hnsftntffga"
    out = io.StringIO()
    monkeypatch.setattr("vdiff.cli.output.console", lambda: Console(file=out, width=80))
    listing = Listing("job", "status", "model", "note", shrink=("model", "note"))
    listing.add(
        job_id, "succeeded", "some-organisation/" + "x" * 60, "[red]no\nmarkup[/red]" * 3, status=1
    )
    listing.print("nothing")
    _, row = out.getvalue().splitlines()
    assert (
        row.startswith(f"{job_id}  succeeded  some-org")
        and "\u2026" in row
        and "[red]" in row
        and len(row) <= 80
    )
    Listing("job").print("nothing")
    assert out.getvalue().endswith("nothing\n")


def test_what_a_model_wrote_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a program to the byte; on a terminal it commands nothing."""
    answer = "a :bug:\t[red]no markup[/red]\nb \x1b[31mred\r\x9b" + "x" * 1200
    job = module.Job.of(
        {
            "id": "job_1",
            "object": "job",
            "status": "succeeded",
            "model": "m [/b]",
            "created_at": 1,
            "attempts": 1,
            "metadata": {"k": "[bold] :bug: \x1b[2J"},
            "result": {"choices": [{"index": 0, "text": answer}]},
        }
    )
    show(job)
    out = capsys.readouterr().out
    assert out.endswith(f"\n\n{answer}\n")
    assert (
        "status    succeeded\n" in out
        and "model     m [/b]\n" in out
        and "labels    k=[bold] :bug: \u241b[2J\n" in out
    )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write(answer)
    assert (
        capsys.readouterr().out
        == answer.translate({0x1B: "\u241b", 0x0D: "\u240d", 0x9B: "\ufffd"}) + "\n"
    )


def test_an_address_is_not_taken_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from vdiff.cli import chat

    @contextmanager
    def somebody(*_: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(base_url="http://[fe80::1]:8000")

    out = io.StringIO()
    monkeypatch.setattr(chat, "connected", somebody)
    monkeypatch.setattr(
        chat, "console", lambda: Console(file=out, width=120, force_terminal=True, highlight=False)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    chat.chat()
    assert "http://[fe80::1]:8000: /new begins anew" in out.getvalue()


def test_a_conflict_of_one_job_does_not_keep_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from contextlib import contextmanager

    from vdiff.cli import jobs

    def act(client: Any, name: str) -> Any:
        if name == "job_2":
            raise module.Conflict("it succeeded", status=409)
        return SimpleNamespace(
            id=name, status="queued", done=False, raw={"id": name, "cancel_requested": False}
        )

    @contextmanager
    def nobody(*_: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(jobs, "connected", nobody)
    with pytest.raises(typer.Exit) as ended:
        jobs.each(["job_1", "job_2", "job_3"], act, True, None, None)
    out, err = capsys.readouterr()
    assert (
        ended.value.exit_code == 1 and err == "job_2: it succeeded\n3 jobs: 2 queued, 1 refused\n"
    )
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["job_1", "job_3"]
