"""`vdiff chat`: a conversation on the terminal; each answer is seen coming out of the noise."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vdiff.cli import exits
from vdiff.cli.connect import (
    Algorithm,
    BaseUrl,
    Key,
    MaxTokens,
    ModelName,
    Seed,
    Set,
    Temperature,
    connected,
    fields_of,
)
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import console, write

if TYPE_CHECKING:
    from vdiff.client import Client, Job

app = typer.Typer()
HELP = "/new begins anew, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


@app.command(
    epilog=examples(
        "vdiff chat",
        "vdiff chat --algorithm threshold --set diffusion.threshold=0.8",
        'vdiff chat --system "Answer with a number." --temperature 0',
        'echo "What is 17 + 25?" | vdiff chat',
        "cat turns.txt | vdiff chat --json | jq .usage",
    )
)
def chat(
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="what the model is told before all")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    algorithm: Algorithm = None,
    given: Set = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Talk to a model. Committed text is plain, what is only proposed is dim, masks are shades.
    Without a terminal, each line of stdin is a turn, each answer is printed when it is whole (with
    --json its job, an object a line), and the exit code is 1 when one did not come.
    """
    fields = fields_of(
        given, max_tokens=max_tokens, temperature=temperature, seed=seed, algorithm=algorithm
    )
    out = console()
    drawn = out.is_terminal and not as_json
    begin: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    missed = False
    with connected(base_url, api_key, model) as client:
        if drawn:
            out.print(f"{client.base_url}: {HELP}", style="dim", markup=False)
        while (said := _ask(out if drawn else None)) is not None:
            if said in ("/quit", "/exit"):
                break
            if said == "/new":
                messages = list(begin)
            elif said.startswith("/"):
                typer.echo(HELP, err=True)
            elif said:
                messages.append({"role": "user", "content": said})
                job = _answer(client, messages, fields, out if drawn else None)
                answer = None if job is None else _told(job, out, drawn, as_json)
                if answer is None:
                    messages.pop()  # an answer that did not come is no part of the conversation
                    missed = True
                else:
                    messages.append({"role": "assistant", "content": answer})
    if missed and not drawn:
        raise typer.Exit(exits.FAILED)


def _ask(out: Console | None) -> str | None:
    """The next turn, asked for where there is a terminal; None when there is no more."""
    try:
        if out is not None and sys.stdin.isatty():
            return out.input("[bold cyan]> [/]").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except EOFError:
        return None
    except KeyboardInterrupt:
        if out is None:
            raise
        return None


def _answer(
    client: Client, messages: list[dict[str, str]], fields: dict[str, Any], out: Console | None
) -> Job | None:
    """The job, when it is over; drawn meanwhile where there is a terminal. None: refused, or
    stopped by Ctrl-C there.
    """
    from vdiff.cli.canvas import draw
    from vdiff.client import ApiError

    body = (
        fields
        if out is None
        else {**fields, "diffusion": {**fields.get("diffusion", {}), "visualize": True}}
    )
    try:
        job = client.submit(messages, priority="interactive", extra_body=body)
    # a field is wrong, or the conversation has become too long: the next turn may do better
    except ApiError as exc:
        typer.echo(exc.message, err=True)
        return None
    try:
        if out is not None:
            draw(client.stream(job), out)
        return client.wait(job)
    except KeyboardInterrupt:
        client.cancel(job)
        if out is None:
            raise
        out.print("stopped", style="yellow")
        return None


def _told(job: Job, out: Console, drawn: bool, as_json: bool) -> str | None:
    """Say what came; the answer's text, None when there is none."""
    if as_json:
        typer.echo(json.dumps(job.raw))
    if not job.ok:
        typer.echo(str((job.error and job.error.get("message")) or job.status), err=True)
        return None
    if drawn:
        facts = job.diffusion or {}
        seconds = ((job.timing or {}).get("total_ms") or 0.0) / 1000
        tokens = (job.usage or {}).get("completion_tokens", 0)
        per_forward = facts.get("tokens_per_forward")
        text = f"{tokens} tokens in {seconds:.2f} s" + (
            f", {per_forward:.1f} a forward" if per_forward else ""
        )
        out.print(text, style="dim")
    elif not as_json:
        write(job.text or "")
    return job.text or ""
