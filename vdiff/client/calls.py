"""Every request of the client as a value: what to send, whether it may be sent twice, how to read
the answer. Pure.

`Client` and `AsyncClient` differ in how they send; what they send is here, once.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from vdiff.client.errors import (
    BadRequest,
    ClientError,
    JobFailed,
    ServerUnreachable,
    UnexpectedAnswer,
)
from vdiff.client.types import Batch, BatchItem, File, Job, Model, Prompt, Wire
from vdiff.progress import Bar

T = TypeVar("T")
W = TypeVar("W", bound=Wire)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
INFILL, LOGLIKELIHOOD = "/v1/infill", "/v1/loglikelihood"
JOB_FIELDS = ("priority", "metadata", "custom_id", "deadlines", "webhook")
MAX_PAGE, MAX_ITEMS = 100, 1000
WAIT_SECONDS = 30.0  # of one long poll; the server may allow less
REST_SECONDS = 0.25  # before asking again when a long poll ended early


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request; `repeatable` as in `vdiff.client.retry`."""

    method: str
    path: str
    read: Callable[[Any], T]
    json: Any = None
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    wait_seconds: float = 0.0  # how long the server may take on purpose
    text: bool = False  # `read` is given the text, not what it says as JSON


@dataclass(frozen=True, slots=True)
class Page(Generic[W]):
    """One page of a list, and what asks for the next."""

    items: list[W]
    next: Call[Page[W]] | None
    whole: Callable[[W], Call[W] | None] | None = (
        None  # what asks for one with what lists leave out, if that is wanted
    )


def new_key() -> str:
    """An Idempotency-Key: made once per call of the client, kept over all its attempts."""
    return f"vdiff-{uuid.uuid4().hex}"


def id_of(thing: Any) -> str:
    """An object's id, or the id itself; it becomes part of a path. Raises ClientError."""
    name = thing if isinstance(thing, str) else getattr(thing, "id", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ClientError(f"{thing!r} is no id")
    return name


# Bodies


def endpoint_of(prompt: Prompt) -> str:
    """Which endpoint a prompt without a word about it is for. Raises ClientError."""
    if isinstance(prompt, Mapping):
        for name, endpoint in (
            ("messages", CHAT),
            ("prompt", COMPLETIONS),
            ("prompt_token_ids", COMPLETIONS),
        ):
            if prompt.get(name) is not None:
                return endpoint
        raise ClientError("a body without messages or prompt needs endpoint=")
    if (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and prompt
        and isinstance(prompt[0], int)
    ):
        return COMPLETIONS
    return CHAT


def body_of(prompt: Prompt, endpoint: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The endpoint's own body; None among the options is "not given". The server checks the rest."""
    given = {k: v for k, v in options.items() if v is not None}
    extra = given.pop("extra_body", {})  # null inside of it means absent to the server
    if isinstance(prompt, Mapping):
        said: Mapping[str, Any] = prompt
    elif endpoint == CHAT:
        said = {
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        }
    else:
        said = {"prompt": prompt}
    return {**said, **given, **extra}


def job_body(prompt: Prompt, options: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """The body of POST /v1/jobs. `model` counts when nothing else names one."""
    inner = {k: v for k, v in options.items() if k not in JOB_FIELDS}
    endpoint = inner.pop("endpoint", None) or endpoint_of(prompt)
    body = body_of(prompt, endpoint, inner)
    custom_id = body.pop(
        "custom_id", None
    )  # no field of a body: a line of `vdiff generate` has it, and the job
    token_ids = body.pop("prompt_token_ids", None) if endpoint == COMPLETIONS else None
    if token_ids is not None:
        name = (
            "prompt" if body.get("prompt") is None else "prompt_token_ids"
        )  # both: the server says that it is too much
        body[name] = token_ids
    if custom_id is not None:
        options = {"custom_id": custom_id, **{k: v for k, v in options.items() if v is not None}}
    if model is not None and body.get("model") is None:
        body["model"] = model
    outer = {k: options[k] for k in JOB_FIELDS if options.get(k) is not None}
    return {"endpoint": endpoint, "body": body, **outer}


def names_model(prompt: Prompt, options: Mapping[str, Any]) -> bool:
    extra = options.get("extra_body") or {}
    named = (options, extra, prompt if isinstance(prompt, Mapping) else {})
    return any(one.get("model") is not None for one in named)


def only_model(models: Iterable[Model]) -> str:
    """The model when nobody named one: the only one that has workers, or the only one at all.
    Raises ClientError.
    """
    every = list(models)
    awake = [m for m in every if m.workers] or every
    if len(awake) == 1:
        return awake[0].id
    names = ", ".join(m.id for m in awake)
    raise ClientError(
        f"name a model: {names}" if names else "the server has no model yet; start a worker"
    )


def batch_lines(prompts: Iterable[Prompt], **options: Any) -> bytes:
    """The lines of a batch file, one per prompt, `line-N` where it has no custom id; `model` must
    be among the options.
    """
    lines = []
    for number, prompt in enumerate(prompts, 1):
        wanted = job_body(prompt, options, None)
        if wanted["body"].get("model") is None:
            raise ClientError("a batch's lines name their model: give model=")
        name = wanted.get("custom_id") or f"line-{number}"
        line = {
            "custom_id": name,
            "method": "POST",
            "url": wanted["endpoint"],
            "body": wanted["body"],
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


@contextmanager
def opened(file: Path | str | bytes | IO[bytes]) -> Iterator[tuple[IO[bytes], str]]:
    """(an open file, a name for it); what was opened here is closed again. Raises ClientError."""
    if isinstance(file, bytes):
        yield io.BytesIO(file), "upload.jsonl"
    elif isinstance(file, str | Path):
        try:
            source = Path(file).open("rb")  # noqa: SIM115  # closed below; an error of the block is not one of opening
        except OSError as exc:
            raise ClientError(f"{file}: {exc.strerror}") from exc
        with source:
            yield source, Path(file).name
    else:
        yield file, Path(str(getattr(file, "name", "upload.jsonl"))).name


# Reading


def cut_off(path: str, exc: Exception) -> ServerUnreachable:
    """Return the error for content that ended too early."""
    return ServerUnreachable(f"{path} was cut off: {exc or type(exc).__name__}", sent=True)


def _same(data: Any) -> Any:
    return data


def _list_of(kind: type[W]) -> Callable[[Any], list[W]]:
    return lambda data: [kind.of(one) for one in data["data"]]


def _pages(
    call: Call[Any],
    kind: type[W],
    cursor: Callable[[dict[str, Any]], str | None],
    name: str,
    whole: Callable[[W], Call[W] | None] | None = None,
) -> Call[Page[W]]:
    def read(data: Any) -> Page[W]:
        after = cursor(data) if data.get("has_more") else None
        following = None if after is None else replace(paged, params={**paged.params, name: after})
        return Page([kind.of(one) for one in data["data"]], following, whole)

    paged: Call[Page[W]] = replace(call, read=read)
    return paged


def _next_cursor(data: dict[str, Any]) -> str | None:
    return data.get("next_cursor")


def _last_id(data: dict[str, Any]) -> str | None:
    return data.get("last_id")


# Jobs


def submit(body: Mapping[str, Any], key: str, wait: float = 0.0) -> Call[Job]:
    headers = {"Idempotency-Key": key}
    if wait:
        headers["Prefer"] = f"wait={wait:.0f}"
    return Call("POST", "/v1/jobs", Job.of, json=body, headers=headers, wait_seconds=wait)


def get(job: Any, wait: float = 0.0) -> Call[Job]:
    return Call(
        "GET",
        f"/v1/jobs/{id_of(job)}",
        Job.of,
        params={"wait": f"{wait:.3f}"} if wait else {},
        wait_seconds=wait,
    )


def action(job: Any, name: str, key: str, body: Any = None) -> Call[Job]:
    """cancel, retry or replay. A cancel may be said twice, a replay has its key; a second retry
    could be another life.
    """
    return Call(
        "POST",
        f"/v1/jobs/{id_of(job)}/{name}",
        Job.of,
        json=body,
        headers={"Idempotency-Key": key},
        repeatable=name in ("cancel", "replay"),
    )


def purge(job: Any) -> Call[Any]:
    return Call("DELETE", f"/v1/jobs/{id_of(job)}", _same)


def attempts(job: Any) -> Call[list[dict[str, Any]]]:
    return Call("GET", f"/v1/jobs/{id_of(job)}/attempts", lambda data: list(data["data"]))


def estimate(body: Mapping[str, Any]) -> Call[dict[str, Any]]:
    return Call("POST", "/v1/jobs/estimate", _same, json=body)


def jobs(filters: Mapping[str, Any], results: bool = False) -> Call[Page[Job]]:
    params = {k: str(v) for k, v in filters.items() if v is not None and k != "metadata"}
    params |= {f"metadata[{k}]": v for k, v in (filters.get("metadata") or {}).items()}
    call = Call("GET", "/v1/jobs", _same, params={"limit": str(MAX_PAGE), **params})

    def whole(job: Job) -> Call[Job] | None:
        return (
            None
            if not job.ok or "result" in job.raw or job.raw.get("purged_at") is not None
            else get(job)
        )

    return _pages(call, Job, _next_cursor, "cursor", whole if results else None)


def less_wait(error: BadRequest, wait: float) -> float:
    """Return the wait to ask for after the server found `wait` too long (VDIFF_MAX_WAIT_SECONDS).
    Raises the error.
    """
    if error.param != "wait" or not wait:
        raise error
    return wait / 2 if wait > 1 else 0.0


def score(job: Job) -> dict[str, Any]:
    """Return the score of a log-likelihood job with one pair. Raises UnexpectedAnswer."""
    try:
        found: dict[str, Any] = (job.result or {})["data"][0]
    except (KeyError, IndexError, TypeError) as exc:
        raise UnexpectedAnswer(f"{job.id} has no scores") from exc
    return found


def failure(job: Job) -> JobFailed | None:
    return None if job.ok else JobFailed(job)


# Files and batches


def file(name: Any) -> Call[File]:
    return Call("GET", f"/v1/files/{id_of(name)}", File.of)


def files(purpose: str | None) -> Call[Page[File]]:
    call = Call("GET", "/v1/files", _same, params={} if purpose is None else {"purpose": purpose})
    return _pages(call, File, _last_id, "after")


def delete_file(name: Any) -> Call[Any]:
    return Call("DELETE", f"/v1/files/{id_of(name)}", _same, repeatable=False)


def create_batch(
    file: Any,
    *,
    endpoint: str,
    completion_window: str,
    metadata: Mapping[str, str] | None,
    key: str,
) -> Call[Batch]:
    body = {
        "input_file_id": id_of(file),
        "endpoint": endpoint,
        "completion_window": completion_window,
    }
    if metadata is not None:
        body["metadata"] = dict(metadata)  # type: ignore[assignment]
    return Call("POST", "/v1/batches", Batch.of, json=body, headers={"Idempotency-Key": key})


def batch(name: Any) -> Call[Batch]:
    return Call("GET", f"/v1/batches/{id_of(name)}", Batch.of)


def batches() -> Call[Page[Batch]]:
    return _pages(
        Call("GET", "/v1/batches", _same, params={"limit": str(MAX_PAGE)}), Batch, _last_id, "after"
    )


def batch_action(name: Any, verb: str) -> Call[Batch]:
    """cancel, or retry_failed (again is as good: what runs already is not failed, and the server
    says so).
    """
    return Call("POST", f"/v1/batches/{id_of(name)}/{verb}", Batch.of, repeatable=verb == "cancel")


def batch_items(name: Any, status: str | None, results: bool) -> Call[Page[BatchItem]]:
    params = {"limit": str(MAX_ITEMS), **({} if status is None else {"status": status})}
    path = f"/v1/batches/{id_of(name)}/items"

    def whole(item: BatchItem) -> Call[BatchItem] | None:
        if not item.done or "response" in item.raw or item.raw.get("purged"):
            return None
        return Call("GET", f"{path}/{item.line}", BatchItem.of)

    call = Call("GET", path, _same, params=params)
    return _pages(call, BatchItem, _next_cursor, "cursor", whole if results else None)


def batch_progress(
    progress: bool | Callable[[int, int, int | None], None], stack: ExitStack
) -> Callable[[Batch], None]:
    """Return the callback for each reading of a batch; the progress bar, if any, ends with the
    stack.
    """
    if progress is False:
        return lambda _: None
    tell = stack.enter_context(Bar("lines")).update if progress is True else progress

    def told(batch: Batch) -> None:
        counts = batch.request_counts
        tell(counts["completed"] + counts["failed"], counts["failed"], counts["total"] or None)

    return told


# The rest


def models() -> Call[list[Model]]:
    return Call("GET", "/v1/models", _list_of(Model))


def server_version() -> Call[str]:
    def read(data: Any) -> str:
        if data["server"] != "vdiff":  # other servers have a /version too
            raise ValueError
        return str(data["version"])

    return Call("GET", "/version", read)


def webhook_secret() -> Call[str]:
    return Call("GET", "/v1/webhook_secret", lambda data: str(data["secret"]))
