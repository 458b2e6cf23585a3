"""Evaluations for both clients: what is sent (pure), and the methods of each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, TypeVar

from vdiff.client import calls
from vdiff.client.calls import MAX_ITEMS, MAX_PAGE, Call, Page, id_of
from vdiff.client.errors import WaitTimeout
from vdiff.client.types import File, Wire
from vdiff.progress import Bar

T = TypeVar("T")
W = TypeVar("W", bound=Wire)
Progress = bool | Callable[[int, int, int | None], None]
POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Wire):
    """An evaluation with its results so far (docs/evaluations.md); in lists `configurations` have a
    status alone.
    """

    id: str
    name: str
    status: str
    items: int
    progress: dict[str, int]
    configurations: list[dict[str, Any]]
    dataset: dict[str, Any]
    metadata: dict[str, str]
    created_at: int
    finished_at: int | None
    reused: bool | None  # of an answer to create: whether it was there
    added: list[dict[str, Any]] | None  # of create and add: what became of each configuration

    @property
    def done(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    @property
    def errors(self) -> int:
        """Answers that are neither right nor wrong, so far."""
        return sum(c["progress"]["error"] for c in self.configurations)

    @property
    def ok(self) -> bool:
        """Every configuration came to its end, and every answer was graded."""
        return (
            all(c["status"] == "completed" for c in self.configurations)
            and self.done
            and not self.errors
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem(Wire):
    """One graded answer; `outcome` is error, failed or passed."""

    configuration: str
    item: int
    line: int
    repeat: int
    seed: int
    outcome: str
    data: dict[str, Any]
    output: str | None
    graders: list[dict[str, Any]]
    error: dict[str, Any] | None
    job_id: str | None


# What is sent


def dataset_of(dataset: Any, limit: int | None) -> dict[str, Any]:
    """A file (or its id), or the name of a bundled one."""
    if isinstance(dataset, File):
        where = {"file_id": dataset.id}
    else:
        where = {"file_id" if str(dataset).startswith("file-") else "bundled": str(dataset)}
    return where if limit is None else {**where, "limit": limit}


def create(body: Mapping[str, Any]) -> Call[Evaluation]:
    # The same content is the same evaluation, so that sending it twice makes one.
    given = {k: v for k, v in body.items() if v is not None}
    return Call("POST", "/v1/evaluations", Evaluation.of, json=given, wait_seconds=120)


def get(evaluation: Any) -> Call[Evaluation]:
    return Call("GET", f"/v1/evaluations/{id_of(evaluation)}", Evaluation.of)


def every() -> Call[Page[Evaluation]]:
    call: Call[Any] = Call("GET", "/v1/evaluations", calls._same, params={"limit": str(MAX_PAGE)})
    return calls._pages(call, Evaluation, calls._last_id, "after")


def add(evaluation: Any, configurations: Sequence[Mapping[str, Any]]) -> Call[Evaluation]:
    body = {"configurations": [dict(c) for c in configurations]}
    return Call(
        "POST", f"/v1/evaluations/{id_of(evaluation)}/configurations", Evaluation.of, json=body
    )


def cancel(evaluation: Any) -> Call[Evaluation]:
    return Call("POST", f"/v1/evaluations/{id_of(evaluation)}/cancel", Evaluation.of)


def delete(evaluation: Any) -> Call[Any]:
    return Call("DELETE", f"/v1/evaluations/{id_of(evaluation)}", calls._same, repeatable=False)


def items(
    evaluation: Any, configuration: str | None, outcome: str | None, texts: bool
) -> Call[Page[EvaluationItem]]:
    filters = {"limit": str(MAX_ITEMS), "configuration": configuration, "outcome": outcome}
    params = {k: v for k, v in filters.items() if v is not None}
    path = f"/v1/evaluations/{id_of(evaluation)}/items"

    def whole(item: EvaluationItem) -> Call[EvaluationItem] | None:
        if "data" in item.raw:
            return None
        which = {"configuration": item.configuration, "repeat": str(item.repeat)}
        return Call("GET", f"{path}/{item.item}", EvaluationItem.of, params=which)

    call: Call[Any] = Call("GET", path, calls._same, params=params)
    return calls._pages(call, EvaluationItem, calls._next_cursor, "cursor")


def report(evaluation: Any, format: str) -> Call[str]:
    path = f"/v1/evaluations/{id_of(evaluation)}/report"
    return Call("GET", path, str, params={"format": format}, text=True)


Side = tuple[Any, str]  # an evaluation (or its id), and the name of a configuration


def compare(first: Side, second: Side, options: Mapping[str, Any]) -> Call[dict[str, Any]]:
    sides = {
        name: {"evaluation": id_of(side[0]), "configuration": side[1]}
        for name, side in (("first", first), ("second", second))
    }
    return Call(
        "POST", "/v1/evaluations/compare", calls._same, json={**sides, **options}, wait_seconds=60
    )


def progress_of(progress: Progress, stack: contextlib.ExitStack) -> Callable[[Evaluation], None]:
    """Return the callback for each reading of an evaluation; the progress bar, if any, ends with
    the stack.
    """
    if progress is False:
        return lambda _: None
    tell = stack.enter_context(Bar("answers")).update if progress is True else progress
    return lambda e: tell(e.progress["graded"], e.errors, e.progress["total"])


class SyncEvaluations:
    """The methods of `vdiff.Client`."""

    def _do(self, call: Call[T], *, retry_seconds: float | None = None) -> T:
        raise NotImplementedError

    def _every(self, call: Call[Page[W]], limit: int | None) -> Iterator[W]:
        raise NotImplementedError

    def create_evaluation(
        self,
        dataset: File | str,
        *,
        template: str | Sequence[Mapping[str, str]],
        graders: Sequence[Mapping[str, Any]],
        configurations: Sequence[Mapping[str, Any]],
        limit: int | None = None,
        **more: Any,
    ) -> Evaluation:
        """Begin one, or come back to the same one. `dataset`: an uploaded file of purpose `evals`,
        or a bundled one's name.
        """
        body = {
            "dataset": dataset_of(dataset, limit),
            "template": template,
            "graders": list(graders),
            "configurations": list(configurations),
            **more,
        }
        return self._do(create(body))

    def get_evaluation(self, evaluation: Evaluation | str) -> Evaluation:
        return self._do(get(evaluation))

    def wait_evaluation(
        self,
        evaluation: Evaluation | str,
        *,
        timeout: float | None = None,
        poll_seconds: float = POLL_SECONDS,
        progress: Progress = False,
    ) -> Evaluation:
        """The evaluation once it is over, however it ended. Raises WaitTimeout."""
        deadline = None if timeout is None else monotonic() + timeout
        with contextlib.ExitStack() as stack:
            told = progress_of(progress, stack)
            while True:
                found = self.get_evaluation(evaluation)
                told(found)
                if found.done:
                    return found
                if deadline is not None and monotonic() >= deadline:
                    raise WaitTimeout(
                        f"{found.id} is {found.status} after {timeout:g} s; it goes on"
                    )
                sleep(poll_seconds)

    def list_evaluations(self, *, limit: int | None = None) -> Iterator[Evaluation]:
        return self._every(every(), limit)

    def add_configurations(
        self, evaluation: Evaluation | str, configurations: Iterable[Mapping[str, Any]]
    ) -> Evaluation:
        """More configurations, or more seeds of one; only what is missing runs."""
        return self._do(add(evaluation, list(configurations)))

    def cancel_evaluation(self, evaluation: Evaluation | str) -> Evaluation:
        return self._do(cancel(evaluation))

    def delete_evaluation(self, evaluation: Evaluation | str) -> None:
        self._do(delete(evaluation))

    def evaluation_items(
        self,
        evaluation: Evaluation | str,
        *,
        configuration: str | None = None,
        outcome: str | None = None,
        limit: int | None = None,
        texts: bool = True,
    ) -> Iterator[EvaluationItem]:
        """Graded answers: errors first, then what failed, then what passed.

        Args:
            texts: False leaves `data`, `output` and `graders` out, which saves a request for each
                answer.
        """
        return self._every(items(evaluation, configuration, outcome, texts), limit)

    def compare_configurations(self, first: Side, second: Side, **options: Any) -> dict[str, Any]:
        """Two of (evaluation, name of a configuration) on the items that both answered; options:
        seed, resamples.
        """
        return self._do(compare(first, second, options))

    def evaluation_report(self, evaluation: Evaluation | str, format: str = "html") -> str:
        """html, markdown or json, as text."""
        return self._do(report(evaluation, format))


class AsyncEvaluations:
    """The methods of `vdiff.AsyncClient`; as those of `SyncEvaluations`."""

    async def _do(self, call: Call[T], *, retry_seconds: float | None = None) -> T:
        raise NotImplementedError

    def _every(self, call: Call[Page[W]], limit: int | None) -> AsyncIterator[W]:
        raise NotImplementedError

    async def create_evaluation(
        self,
        dataset: File | str,
        *,
        template: str | Sequence[Mapping[str, str]],
        graders: Sequence[Mapping[str, Any]],
        configurations: Sequence[Mapping[str, Any]],
        limit: int | None = None,
        **more: Any,
    ) -> Evaluation:
        body = {
            "dataset": dataset_of(dataset, limit),
            "template": template,
            "graders": list(graders),
            "configurations": list(configurations),
            **more,
        }
        return await self._do(create(body))

    async def get_evaluation(self, evaluation: Evaluation | str) -> Evaluation:
        return await self._do(get(evaluation))

    async def wait_evaluation(
        self,
        evaluation: Evaluation | str,
        *,
        timeout: float | None = None,
        poll_seconds: float = POLL_SECONDS,
        progress: Progress = False,
    ) -> Evaluation:
        import asyncio

        deadline = None if timeout is None else monotonic() + timeout
        with contextlib.ExitStack() as stack:
            told = progress_of(progress, stack)
            while True:
                found = await self.get_evaluation(evaluation)
                told(found)
                if found.done:
                    return found
                if deadline is not None and monotonic() >= deadline:
                    raise WaitTimeout(
                        f"{found.id} is {found.status} after {timeout:g} s; it goes on"
                    )
                await asyncio.sleep(poll_seconds)

    def list_evaluations(self, *, limit: int | None = None) -> AsyncIterator[Evaluation]:
        return self._every(every(), limit)

    async def add_configurations(
        self, evaluation: Evaluation | str, configurations: Iterable[Mapping[str, Any]]
    ) -> Evaluation:
        return await self._do(add(evaluation, list(configurations)))

    async def cancel_evaluation(self, evaluation: Evaluation | str) -> Evaluation:
        return await self._do(cancel(evaluation))

    async def delete_evaluation(self, evaluation: Evaluation | str) -> None:
        await self._do(delete(evaluation))

    def evaluation_items(
        self,
        evaluation: Evaluation | str,
        *,
        configuration: str | None = None,
        outcome: str | None = None,
        limit: int | None = None,
        texts: bool = True,
    ) -> AsyncIterator[EvaluationItem]:
        return self._every(items(evaluation, configuration, outcome, texts), limit)

    async def compare_configurations(
        self, first: Side, second: Side, **options: Any
    ) -> dict[str, Any]:
        return await self._do(compare(first, second, options))

    async def evaluation_report(self, evaluation: Evaluation | str, format: str = "html") -> str:
        return await self._do(report(evaluation, format))
