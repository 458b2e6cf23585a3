"""Types that the client returns: the wire's objects with names that an editor completes; `raw` is
the whole object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

from vdiff.client.errors import ClientError, JobFailed, UnexpectedAnswer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text, messages, token ids, or a whole body of the endpoint."""


class GenerationOptions(TypedDict, total=False):
    """The endpoint's own fields (docs/api.md, "Request fields"); `extra_body` takes any other."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    n: int
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool | int
    top_logprobs: int
    diffusion: Mapping[str, Any]
    extra_body: Mapping[str, Any]


class JobOptions(GenerationOptions, total=False):
    """And those of the job around it."""

    endpoint: str
    priority: str
    metadata: Mapping[str, str]
    custom_id: str
    deadlines: Mapping[str, Any]
    webhook: Mapping[str, Any]


W = TypeVar("W", bound="Wire")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """An object of the wire. A newer server's new fields are in `raw` alone."""

    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls: type[W], data: Any) -> W:
        """Raises UnexpectedAnswer."""
        if not isinstance(data, dict) or "object" not in data:
            raise UnexpectedAnswer(f"expected a {cls.__name__.lower()}, got {str(data)[:200]!r}")
        return cls(raw=data, **{f.name: data.get(f.name) for f in fields(cls) if f.name != "raw"})


def _texts(result: Mapping[str, Any] | None) -> list[str]:
    if output := (result or {}).get("output"):
        return [part["text"] for item in output for part in item["content"]]
    choices = (result or {}).get("choices") or ()
    return [
        c["message"].get("content") or "" if "message" in c else c.get("text") or ""
        for c in choices
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Wire):
    """A job as it was when the server answered."""

    id: str
    status: str
    done: bool
    endpoint: str
    model: str
    priority: str
    custom_id: str | None
    batch_id: str | None
    metadata: dict[str, str]
    created_at: int
    started_at: int | None
    finished_at: int | None
    attempts: int
    life: int
    queue_position: int | None
    eta_seconds: float | None
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
    timing: dict[str, Any] | None
    diffusion: dict[str, Any] | None
    replay: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        return self.status == "succeeded"

    @property
    def text(self) -> str | None:
        """The (first) answer's text; None without one."""
        texts = self.texts
        return texts[0] if texts else None

    @property
    def texts(self) -> list[str]:
        """Return the texts of all `n` answers. Raises ClientError: the job is one of a list, which
        carries no results.
        """
        if self.ok and "result" not in self.raw:
            raise ClientError(
                f"a list carries no results: get({self.id!r}), or list_jobs(results=True), has it"
            )
        return _texts(self.result)

    def require(self) -> Job:
        """Itself. Raises JobFailed unless it succeeded."""
        if not self.ok:
            raise JobFailed(self)
        return self


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job; `type` is queued, started, progress, denoise or done."""

    id: str
    type: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one prompt of `map`: a finished job, or the error that prevented it."""

    index: int
    prompt: Prompt
    job: Job | None
    error: ClientError | None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def text(self) -> str | None:
        return None if self.job is None else self.job.text


@dataclass(frozen=True, slots=True, kw_only=True)
class File(Wire):
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Wire):
    """A batch; `outcome` says, once it is over, whether all, some or no lines succeeded."""

    id: str
    status: str
    endpoint: str
    model: str | None
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    completion_window: str
    request_counts: dict[str, int]
    outcome: str | None
    errors: dict[str, Any] | None
    top_errors: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    usage: dict[str, Any] | None
    created_at: int
    expires_at: int | None

    @property
    def done(self) -> bool:
        return self.status in ("completed", "failed", "expired", "cancelled")

    @property
    def ok(self) -> bool:
        """Every line succeeded."""
        return self.status == "completed" and self.outcome == "all_succeeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchItem(Wire):
    """One line of a batch."""

    line: int
    custom_id: str
    job_id: str
    status: str
    attempts: int
    response: dict[str, Any] | None
    error: dict[str, Any] | None
    usage: dict[str, Any] | None

    @property
    def done(self) -> bool:
        return self.status not in ("queued", "running")

    @property
    def ok(self) -> bool:
        return self.status == "succeeded"

    @property
    def text(self) -> str | None:
        """The (first) answer's text. Raises ClientError: the line was listed with `results=False`."""
        if self.ok and "response" not in self.raw:
            raise ClientError(
                "the line was listed without its response: batch_items(results=True) has it"
            )
        texts = _texts((self.response or {}).get("body"))
        return texts[0] if texts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Wire):
    id: str
    family: str
    context_length: int
    revision: str | None
    device: str
    dtype: str
    slots: int
    workers: int
    capabilities: dict[str, Any]
    defaults: dict[str, Any]
