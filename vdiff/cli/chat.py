"""`vdiff chat`: a conversation on the terminal; each answer is seen coming out of the noise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
from vdiff.cli.options import examples
from vdiff.cli.output import console

if TYPE_CHECKING:
    from vdiff.client import Client, Job

app = typer.Typer()
HELP = "/new begins anew, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


@app.command(
    epilog=examples(
        "vdiff chat", "vdiff chat --algorithm threshold --set diffusion.threshold=0.8",
        'vdiff chat --system "Answer with a number." --temperature 0', 'echo "What is 17 + 25?" | vdiff chat',
    )
)  # fmt: skip
def chat(
    model: ModelName = None,
    system: Annotated[str | None, typer.Option(help="what the model is told before all")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    algorithm: Algorithm = None,
    given: Set = None,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Talk to a model. Committed text is plain, what is only proposed is dim, masks are shades. Without a terminal, each line
    of stdin is a turn and each answer is printed when it is whole."""
    fields = fields_of(given, max_tokens=max_tokens, temperature=temperature, seed=seed, algorithm=algorithm)
    out = console()
    begin: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    with connected(base_url, api_key, model) as client:
        if out.is_terminal:
            out.print(f"{client.base_url}: {HELP}", style="dim")
        while (said := _ask(out)) is not None:
            if said in ("/quit", "/exit"):
                return
            if said == "/new":
                messages = list(begin)
            elif said.startswith("/"):
                out.print(HELP, style="dim")
            elif said:
                messages.append({"role": "user", "content": said})
                answer = _answer(client, messages, fields, out)
                if answer is None:
                    messages.pop()  # an answer that did not come is no part of the conversation
                else:
                    messages.append({"role": "assistant", "content": answer})


def _ask(out: Console) -> str | None:
    """The next turn; None when there is no more."""
    try:
        if sys.stdin.isatty():
            return out.input("[bold cyan]> [/]").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(client: Client, messages: list[dict[str, str]], fields: dict[str, Any], out: Console) -> str | None:
    from vdiff.cli.canvas import draw
    from vdiff.client import ApiError

    shown = out.is_terminal
    body = {**fields, "diffusion": {**fields.get("diffusion", {}), "visualize": True}} if shown else fields
    try:
        job = client.submit(messages, priority="interactive", extra_body=body)
    except ApiError as exc:  # a field is wrong, or the conversation has become too long: the next turn may do better
        typer.echo(exc.message, err=True)
        return None
    try:
        if shown:
            draw(client.stream(job), out)
        over = client.wait(job)
    except KeyboardInterrupt:
        client.cancel(job)
        out.print("stopped", style="yellow")
        return None
    return _told(over, out, shown)


def _told(job: Job, out: Console, shown: bool) -> str | None:
    if not job.ok:
        typer.echo(str((job.error and job.error.get("message")) or job.status), err=True)
        return None
    if shown:
        facts = job.diffusion or {}
        seconds = ((job.timing or {}).get("total_ms") or 0.0) / 1000
        tokens = (job.usage or {}).get("completion_tokens", 0)
        per_forward = facts.get("tokens_per_forward")
        text = f"{tokens} tokens in {seconds:.2f} s" + (f", {per_forward:.1f} a forward" if per_forward else "")
        out.print(text, style="dim")
    else:
        out.print(job.text or "", markup=False, soft_wrap=True)
    return job.text or ""
