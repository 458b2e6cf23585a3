"""`vdiff batch`: OpenAI's batches from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.checks import MOST
from shared.errors import InvalidParameter
from shared.text_files import decode_text
from vdiff.cli import exits
from vdiff.cli.connect import BaseUrl, Key, Metadata, Timeout, connected, pairs, require_writable
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing, detached, fact, style_of, write

if TYPE_CHECKING:
    from vdiff.client import Batch, BatchItem, Client

app = typer.Typer(help="Batches: submit, list, get, cancel, retry, results.", no_args_is_help=True)
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="a batch's id")]
POLL_SECONDS = 1.0


def endpoint_of(file: Path) -> str:
    """Return the endpoint of the file's first line; the server checks the others. Raises
    InvalidParameter.
    """
    try:
        with file.open("rb") as lines:
            first = json.loads(decode_text(lines.readline(), f"{file}, line 1", param="FILE"))
        return str(first["url"])
    except OSError as exc:
        raise InvalidParameter(f"{file}: {exc.strerror}", param="FILE") from exc
    except (ValueError, KeyError, TypeError) as exc:
        message = f"{file}, line 1: no line of a batch, which is an object of custom_id, method, url and body (docs/batches.md)"
        raise InvalidParameter(
            f"{message}; `vdiff submit --file` takes prompts", param="FILE"
        ) from exc


def show(batch: Batch) -> None:
    """A batch for people."""
    counts = batch.request_counts
    fact("batch", batch.id)
    fact(
        "status",
        batch.status + (f", {batch.outcome}" if batch.outcome else ""),
        style_of(batch.status),
    )
    fact("model", batch.model or "")
    fact("lines", f"{counts['total']}: {counts['completed']} succeeded, {counts['failed']} failed")
    for name, file in (("output", batch.output_file_id), ("errors", batch.error_file_id)):
        if file:
            fact(name, file)
    for error in batch.top_errors or ():
        fact("", json.dumps(error, ensure_ascii=False))
    for error in (batch.errors or {}).get("data", ())[:20]:
        write(f"line {error.get('line')}: {error.get('code')}: {error.get('message')}")


def finished(
    client: Client, batch: Batch, timeout: float | None, output: Path | None, as_json: bool
) -> None:
    """Wait, then tell. Exit code 1 unless every line succeeded."""
    with detached(f"vdiff batch get {batch.id} --wait"):
        over = client.wait_batch(batch, timeout=timeout, poll_seconds=POLL_SECONDS, progress=True)
    if output is not None:
        save(client, over, output)
    if as_json:
        typer.echo(json.dumps(over.raw))
    else:
        show(over)
    if not over.ok:
        raise typer.Exit(exits.FAILED)


@app.command(
    epilog=examples(
        "vdiff batch submit requests.jsonl",
        "vdiff batch submit requests.jsonl --wait --output results.jsonl",
        "vdiff batch submit requests.jsonl --window 2h --metadata run=7",
    )
)
def submit(
    file: Annotated[
        Path, typer.Argument(help="JSONL of {custom_id, method, url, body}, as OpenAI has it")
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="until it is over; exit code 1 unless all succeeded")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="with --wait: write the results here")] = None,
    window: Annotated[str, typer.Option(help="time it has: 24h, 30m, 7d")] = "24h",
    metadata: Metadata = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Upload a file of requests and run it. Prints the batch's id."""
    if not wait and (output is not None or timeout is not None):
        raise InvalidParameter("--output and --timeout need --wait", param="--wait")
    require_writable(output)
    labels = pairs(metadata, "--metadata")
    endpoint = endpoint_of(file)
    with connected(base_url, api_key) as client:
        uploaded = client.upload(file)
        batch = client.create_batch(
            uploaded, endpoint=endpoint, completion_window=window, metadata=labels or None
        )
        if wait:
            typer.echo(f"{batch.id} is {batch.status}", err=True)
            finished(client, batch, timeout, output, as_json)
        elif as_json:
            typer.echo(json.dumps(batch.raw))
        else:
            typer.echo(batch.id)
            typer.echo(f"its end: vdiff batch get {batch.id} --wait", err=True)


@app.command(
    "list", epilog=examples("vdiff batch list", "vdiff batch list --limit 100 --json | jq .id")
)
def list_batches(
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="at most so many")] = 20,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Batches, newest first. With --json an object a line."""
    listing = Listing(
        "batch", "status", "lines", "good", "bad", "model", "outcome", shrink=("model", "outcome")
    )
    with connected(base_url, api_key) as client:
        for batch in client.list_batches(limit=limit):
            if as_json:
                typer.echo(json.dumps(batch.raw))
                continue
            counts = batch.request_counts
            numbers = (str(counts[name]) for name in ("total", "completed", "failed"))
            listing.add(
                batch.id, batch.status, *numbers, batch.model or "", batch.outcome or "", status=1
            )
    if not as_json:
        listing.print("no batches")


@app.command(
    epilog=examples(
        "vdiff batch get batch_01j...", "vdiff batch get batch_01j... --wait --output results.jsonl"
    )
)
def get(
    batch: BatchId,
    wait: Annotated[
        bool, typer.Option("--wait", help="until it is over; exit code 1 unless all succeeded")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="with --wait: write the results here")] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """One batch: state, counts, files, and what was wrong with its lines."""
    if not wait and (output is not None or timeout is not None):
        raise InvalidParameter("--output and --timeout need --wait", param="--wait")
    require_writable(output)
    with connected(base_url, api_key) as client:
        found = client.get_batch(batch)
        if wait:
            finished(client, found, timeout, output, as_json)
            return
    if as_json:
        typer.echo(json.dumps(found.raw))
    else:
        show(found)


@app.command(epilog=examples("vdiff batch cancel batch_01j..."))
def cancel(
    batch: BatchId, as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None
) -> None:
    """Stop what has not ended; what has keeps its results."""
    with connected(base_url, api_key) as client:
        found = client.cancel_batch(batch)
    typer.echo(json.dumps(found.raw) if as_json else f"{found.id} {found.status}")


@app.command(epilog=examples("vdiff batch retry batch_01j..."))
def retry(
    batch: BatchId, as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None
) -> None:
    """Run again every line that failed, expired or was cancelled."""
    with connected(base_url, api_key) as client:
        found = client.retry_failed(batch)
    typer.echo(
        json.dumps(found.raw)
        if as_json
        else f"{found.id} {found.status}, {found.raw['retried']} lines again"
    )


def result_line(item: BatchItem) -> str:
    return json.dumps(
        {
            "custom_id": item.custom_id,
            "job_id": item.job_id,
            "status": item.status,
            "response": item.response,
            "error": item.error,
        },
        ensure_ascii=False,
    )


def save(client: Client, batch: Batch, output: Path) -> None:
    """The lines that are over, in order, as JSON."""
    try:
        with output.open("w", encoding="utf-8") as out:
            out.writelines(
                result_line(item) + "\n" for item in client.batch_items(batch) if item.done
            )
    except OSError as exc:
        raise InvalidParameter(f"{output}: {exc.strerror}", param="--output") from exc
    typer.echo(f"wrote {output}", err=True)


@app.command(
    epilog=examples(
        "vdiff batch results batch_01j... > results.jsonl",
        "vdiff batch results batch_01j... --status failed",
        "vdiff batch results batch_01j... --text",
    )
)
def results(
    batch: BatchId,
    status: Annotated[
        str | None, typer.Option(help="only these: succeeded, failed, expired, cancelled")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="custom_id, a tab and the answer's text instead of JSON")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="write them here [default: stdout]")] = None,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """The lines that are over, in order, also while it runs: {custom_id, job_id, status, response,
    error} a line.
    """
    if output is not None and (text or status is not None):
        raise InvalidParameter("--output writes all lines, as JSON", param="--output")
    with connected(base_url, api_key) as client:
        if output is not None:
            save(client, client.get_batch(batch), output)
            return
        for item in client.batch_items(batch, status=status):
            if item.done:
                plain = (item.text or "").replace("\\", "\\\\").replace("\n", "\\n")
                write(f"{item.custom_id}\t{plain}" if text else result_line(item))
