"""`vdiff jobs`: look at jobs, follow one, stop or repeat them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.checks import MOST
from shared.errors import InvalidParameter
from vdiff.cli import exits
from vdiff.cli.connect import BaseUrl, Key, Metadata, Timeout, connected, pairs
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing, console, detached, fact, style_of, write

if TYPE_CHECKING:
    from vdiff.client import Client, Event, Job

app = typer.Typer(help="Jobs: list, get, watch, cancel, retry, replay.", no_args_is_help=True)
OPEN = ("queued", "running")
JobId = Annotated[str, typer.Argument(metavar="JOB", help="a job's id")]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB...", help="ids of jobs")]


def _took(job: Job) -> str:
    from vdiff.progress import duration

    if job.started_at is None:
        return ""
    return duration((job.finished_at or time.time()) - job.started_at)


def _ago(moment: float) -> str:
    from vdiff.progress import duration

    return f"{duration(max(0.0, time.time() - moment))} ago"


def listing_of(jobs: Iterator[Job]) -> Listing:
    listing = Listing(
        "job", "status", "model", "age", "ran", "tokens", "note", shrink=("model", "note")
    )
    for job in jobs:
        tokens = (job.usage or {}).get(
            "completion_tokens", (job.progress or {}).get("tokens_committed")
        )
        note = (job.error or {}).get("code") or job.custom_id or ""
        listing.add(
            job.id,
            job.status,
            job.model,
            _ago(job.created_at).removesuffix(" ago"),
            _took(job),
            "" if tokens is None else str(tokens),
            note,
            status=1,
        )
    return listing


@app.command(
    "list",
    epilog=examples(
        "vdiff jobs list --status failed", "vdiff jobs list --metadata run=7 --limit 100 --json"
    ),
)
def list_jobs(
    status: Annotated[
        str | None, typer.Option(help="queued, running, succeeded, failed, cancelled or expired")
    ] = None,
    model: Annotated[str | None, typer.Option(help="of this model")] = None,
    batch: Annotated[str | None, typer.Option(help="lines of this batch")] = None,
    metadata: Metadata = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="at most so many")] = 20,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Jobs, newest first. With --json an object a line."""
    labels = pairs(metadata, "--metadata")
    with connected(base_url, api_key) as client:
        found = client.list_jobs(
            status=status, model=model, batch_id=batch, metadata=labels, limit=limit
        )
        if as_json:
            for job in found:
                typer.echo(json.dumps(job.raw))
            return
        listing = listing_of(found)
    listing.print("no jobs")


def show(job: Job) -> None:
    """A job for people: what it is, how it went, its text."""
    timing = job.timing or {}
    facts = {
        "job": job.id,
        "status": job.status,
        "model": job.model,
        "made": _ago(job.created_at),
        "ran": _took(job),
        "waits": None if job.queue_position is None else f"place {job.queue_position}",
        "done in": None if job.eta_seconds is None else f"about {job.eta_seconds:.1f} s",
        "attempts": str(job.attempts) if job.attempts > 1 else None,
        "tokens": None
        if job.usage is None
        else f"{job.usage['prompt_tokens']} + {job.usage['completion_tokens']}",
        "forwards": (job.diffusion or {}).get("forwards"),
        "queued": f"{timing['queued_ms']:.0f} ms" if timing.get("queued_ms") is not None else None,
        "labels": ", ".join(f"{k}={v}" for k, v in job.metadata.items()),
        "custom id": job.custom_id,
        "batch": job.batch_id,
    }
    for name, value in facts.items():
        if value not in (None, ""):
            fact(name, value, style_of(job.status) if name == "status" else "")
    if (
        job.error is not None and job.error.get("code") != job.status
    ):  # of a cancelled one it says nothing more
        fact("error", f"{job.error.get('code')}: {job.error.get('message')}")
    for text in job.texts:
        write("")
        write(text)


@app.command(
    epilog=examples(
        "vdiff jobs get job_01j...", "vdiff jobs get job_01j... --wait --json | jq .result"
    )
)
def get(
    job: JobId,
    wait: Annotated[
        bool, typer.Option("--wait", help="until it is over; exit code 1 unless it succeeded")
    ] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """One job: state, timing, text or error."""
    if timeout is not None and not wait:
        raise InvalidParameter("--timeout needs --wait", param="--wait")
    with connected(base_url, api_key) as client:
        if wait:
            with detached(f"vdiff jobs get {job} --wait"):
                found = client.wait(job, timeout=timeout)
        else:
            found = client.get(job)
    if as_json:
        typer.echo(json.dumps(found.raw))
    else:
        show(found)
    if wait and not found.ok:
        raise typer.Exit(exits.FAILED)


def lines_of(events: Iterator[Event]) -> Iterator[str]:
    """Events as lines of a log."""
    for event in events:
        data = event.data
        if event.type == "started":
            yield f"started on {data['worker_id']}, attempt {data['attempt']}"
        elif event.type == "progress" and data["text"]:
            answer = f"answer {data['index']}, " if data["index"] else ""
            yield f"{answer}step {data['step']}, {data['tokens_committed']}/{data['tokens_total']}: {data['text']!r}"
        elif event.type == "queued":
            yield "queued"


@app.command(epilog=examples("vdiff jobs watch job_01j...", "vdiff jobs watch job_01j... --json"))
def watch(
    job: JobId, as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None
) -> None:
    """Follow a job to its end: on a terminal its text as it comes, else a line an event. Exit code
    1 unless it succeeds.
    """
    from vdiff.cli.canvas import draw

    out = console()
    with connected(base_url, api_key) as client, detached(f"vdiff jobs watch {job}"):
        events = client.stream(job)
        if as_json:
            for event in events:
                typer.echo(json.dumps({"id": event.id, "event": event.type, "data": event.data}))
        elif out.is_terminal:
            draw(events, out)
        else:
            for line in lines_of(events):
                write(line)
        found = client.get(job)
    if not as_json and (not out.is_terminal or not found.ok):
        show(found)
    if not found.ok:
        raise typer.Exit(exits.FAILED)


def each(
    jobs: list[str] | Callable[[Client], list[str]],
    act: Callable[[Client, str], Job],
    as_json: bool,
    base_url: str | None,
    api_key: str | None,
) -> None:
    """Do something to every job; one that refuses does not keep the rest from it. Of several, how
    many became what.
    """
    from vdiff.client import ClientError, ServerUnreachable

    worst, states = exits.OK, Counter[str]()
    with connected(base_url, api_key) as client:
        names = jobs if isinstance(jobs, list) else jobs(client)
        for name in names:
            try:
                found = act(client, name)
            except ServerUnreachable:
                raise  # the rest would fare no better
            except ClientError as exc:
                typer.echo(f"{name}: {exc.message}", err=True)
                worst = worst or exits.exit_code(exc)
                states["refused"] += 1
                continue
            states[_state(found)] += 1
            typer.echo(json.dumps(found.raw) if as_json else f"{found.id} {_state(found)}")
    if len(names) != 1:
        counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
        typer.echo(f"{len(names)} jobs: {counts}" if names else "no such jobs", err=True)
    if worst:
        raise typer.Exit(worst)


def _state(job: Job) -> str:
    asked: Any = job.raw.get("cancel_requested")
    return "will stop at its next step" if asked and not job.done else job.status


@app.command(
    epilog=examples(
        "vdiff jobs cancel job_01j... job_01k...",
        "vdiff jobs cancel --metadata run=7",
        "vdiff jobs cancel --status queued",
    )
)
def cancel(
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB...]", help="ids of jobs; or else a filter")
    ] = None,
    status: Annotated[str | None, typer.Option(help="all that are queued, or running")] = None,
    model: Annotated[str | None, typer.Option(help="all of this model that are not over")] = None,
    batch: Annotated[
        str | None, typer.Option(help="all lines of this batch that are not over")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="all with this label that are not over, repeatable"),
    ] = None,
    as_json: AsJson = False,
    base_url: BaseUrl = None,
    api_key: Key = None,
) -> None:
    """Stop jobs, between two denoising steps: those named, or all that every filter fits. What is
    over stays as it is, and one that cannot be stopped does not keep the rest.
    """
    labels = pairs(metadata, "--metadata")
    if bool(jobs) == any((status, model, batch, labels)):
        raise InvalidParameter(
            "give ids of jobs, or --status, --model, --batch, --metadata", param="JOB"
        )
    if status not in (None, *OPEN):
        raise InvalidParameter(
            f"--status must be {' or '.join(OPEN)}; the others are over", param="--status"
        )

    def chosen(client: Client) -> list[str]:
        found: dict[
            str, None
        ] = {}  # one that moves from queued to running between the two lists is in both
        for state in OPEN if status is None else (status,):
            listed = client.list_jobs(status=state, model=model, batch_id=batch, metadata=labels)
            found |= dict.fromkeys(job.id for job in listed)
        return list(found)

    each(jobs or chosen, lambda client, name: client.cancel(name), as_json, base_url, api_key)


@app.command(epilog=examples("vdiff jobs retry job_01j..."))
def retry(
    jobs: JobIds, as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None
) -> None:
    """Another life for jobs that failed, expired or were cancelled; they keep their ids."""
    each(jobs, lambda client, name: client.retry(name), as_json, base_url, api_key)


@app.command(epilog=examples("vdiff jobs replay job_01j..."))
def replay(
    jobs: JobIds, as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None
) -> None:
    """New jobs that ask for exactly the same; each prints its id and later says whether its text is
    the same.
    """
    each(jobs, lambda client, name: client.replay(name), as_json, base_url, api_key)
