"""`vdiff submit`: one prompt, or a file of them."""

from __future__ import annotations

import json
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from shared.errors import InvalidParameter, MissingParameter
from vdiff.cli import exits
from vdiff.cli.connect import (
    Algorithm,
    BaseUrl,
    Key,
    MaxTokens,
    Metadata,
    ModelName,
    Seed,
    Set,
    Temperature,
    Timeout,
    connected,
    fields_of,
    pairs,
    prompts_of,
    read_stdin,
    require_writable,
)
from vdiff.cli.options import LINES, AsJson, examples
from vdiff.cli.output import aside, detached, write

if TYPE_CHECKING:
    from vdiff.client import Client, Outcome

app = typer.Typer()
SUBMITTERS = 8  # requests at once when nobody waits for the ends


@app.command(
    epilog=examples(
        'vdiff submit "What is 17 + 25?" --wait',
        'vdiff submit "What is 17 + 25?" --algorithm threshold --set diffusion.threshold=0.9',
        "vdiff submit --file prompts.txt --wait --json > answers.jsonl",
        "vdiff submit --file requests.jsonl --priority bulk --metadata run=7",
        "cat prompts.txt | vdiff submit --file - --wait",
    )
)
def submit(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; - reads it from stdin")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help=f"a prompt a line; a .jsonl: {LINES}; - is stdin, prompts"),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="until all is over, and print the answers")
    ] = False,
    timeout: Timeout = None,
    model: ModelName = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    algorithm: Algorithm = None,
    given: Set = None,
    endpoint: Annotated[str | None, typer.Option(help="[default: /v1/chat/completions]")] = None,
    priority: Annotated[
        str | None, typer.Option(help="interactive, normal or bulk [default: normal]")
    ] = None,
    metadata: Metadata = None,
    custom_id: Annotated[str | None, typer.Option(help="your own name for the job")] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="who is told of its end")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="the same command under the same key takes over its jobs, for 24 hours"),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, help="of a file with --wait: jobs open at once")
    ] = 64,
    output: Annotated[
        Path | None, typer.Option(help="of a file with --wait: write here [default: stdout]")
    ] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Queue one prompt or a file of prompts. Prints ids; with --wait the answers in the prompts'
    order, and exit code 1 when one failed. With --json a job (a file with --wait: an outcome) a
    line.
    """
    if (prompt is None) == (file is None):
        raise MissingParameter("give a prompt, or a file of them with --file", param="prompt")
    if output is not None and not (wait and file is not None):
        raise InvalidParameter("--output is for --file with --wait", param="--output")
    if custom_id is not None and file is not None:
        raise InvalidParameter("--custom-id is for one prompt", param="--custom-id")
    if timeout is not None and (file is not None or not wait):
        raise InvalidParameter("--timeout is for one prompt with --wait", param="--timeout")
    require_writable(output)
    fields = fields_of(
        given, max_tokens=max_tokens, temperature=temperature, seed=seed, algorithm=algorithm
    )
    options: dict[str, Any] = {
        "extra_body": fields,
        "endpoint": endpoint,
        "priority": priority,
        "metadata": pairs(metadata, "--metadata"),
        "custom_id": custom_id,
        "webhook": None if webhook is None else {"url": webhook},
    }
    with connected(base_url, api_key, model, patient=file is not None) as client:
        if prompt is not None:
            _one(
                client,
                read_stdin() if prompt == "-" else prompt,
                options,
                idempotency_key,
                wait,
                timeout,
                as_json,
            )
            return
        assert file is not None
        key = idempotency_key or f"submit-{uuid.uuid4().hex[:12]}"
        prompts = prompts_of(file)
        if wait:
            again = (
                f"vdiff submit --file {file} --wait --idempotency-key {key} and the same options"
            )
            with detached(again):
                outcomes = client.map(
                    prompts, concurrency=concurrency, idempotency_key=key, **options
                )
            _write(outcomes, output, as_json)
        else:
            _queue(client, prompts, key, options, as_json)


def _one(
    client: Client,
    prompt: str,
    options: dict[str, Any],
    key: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    job = client.submit(prompt, idempotency_key=key, **options)
    if wait:
        if not as_json:
            typer.echo(f"{job.id} is {job.status}", err=True)
        with detached(f"vdiff jobs get {job.id} --wait"):
            job = client.wait(job, timeout=timeout)
    if as_json:
        typer.echo(json.dumps(job.raw))
    elif wait:
        for text in job.require().texts:
            write(text)
    else:
        typer.echo(job.id)
        typer.echo(f"its answer: vdiff jobs get {job.id} --wait", err=True)
    if wait and not job.ok:
        raise typer.Exit(exits.FAILED)


def _queue(
    client: Client, prompts: list[Any], key: str, options: dict[str, Any], as_json: bool
) -> None:
    """Submit without waiting: an id (or a job) a line, in the file's order; a prompt that is
    refused is told on stderr.
    """
    from vdiff.client import ApiError, Job
    from vdiff.progress import Bar

    def put(numbered: tuple[int, Any]) -> Job | ApiError:
        try:
            return client.submit(numbered[1], idempotency_key=f"{key}-{numbered[0]}", **options)
        except ApiError as exc:
            return exc

    failed = 0
    again = f"the same command with --idempotency-key {key}"
    bar = Bar(
        "submitted", total=len(prompts), shown=not sys.stdout.isatty()
    )  # there the ids themselves show how far it is
    with detached(again), bar, ThreadPoolExecutor(SUBMITTERS) as pool:
        for number, got in enumerate(pool.map(put, enumerate(prompts)), 1):
            if isinstance(got, ApiError):
                failed += 1
                aside(f"prompt {number}: {got.message}")
            else:
                typer.echo(json.dumps(got.raw) if as_json else got.id)
            bar.update(number, failed, len(prompts))
    if failed:
        raise typer.Exit(exits.FAILED)


def outcome_line(outcome: Outcome) -> dict[str, Any]:
    """An outcome for programs."""
    error = outcome.error
    return {
        "index": outcome.index,
        "job_id": outcome.job.id if outcome.job else None,
        "custom_id": outcome.job.custom_id if outcome.job else None,
        "status": outcome.job.status if outcome.job else "refused",
        "text": outcome.text,
        "usage": outcome.job.usage if outcome.job else None,
        "error": None
        if error is None
        else {"code": error.code, "message": error.message, "param": error.param},
    }


def _write(outcomes: list[Outcome], output: Path | None, as_json: bool) -> None:
    """A line an answer, in order: JSON, or its text with line ends written as \\n; what failed is
    told on stderr.
    """

    def put(out: TextIO) -> None:
        for outcome in outcomes:
            if as_json:
                out.write(json.dumps(outcome_line(outcome), ensure_ascii=False) + "\n")
            else:
                out.write((outcome.text or "").replace("\\", "\\\\").replace("\n", "\\n") + "\n")

    failed = [outcome for outcome in outcomes if not outcome.ok]
    if output is None:
        put(sys.stdout)
    else:
        try:
            with output.open("w", encoding="utf-8") as out:
                put(out)
        except OSError as exc:
            raise InvalidParameter(f"{output}: {exc.strerror}", param="--output") from exc
    for outcome in failed[:20]:
        typer.echo(f"prompt {outcome.index + 1}: {outcome.error}", err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(outcomes)} failed", err=True)
        raise typer.Exit(exits.FAILED)
