"""Evaluations as requests see them: created, added to, looked at, cancelled, removed. What takes
long is the caretaker's.

The same dataset, template and graders are the same evaluation, whatever it is called: creating it
again adds what is new to the one that is there, and a configuration that it has (same model,
revision and fields) is not run again. More seeds of one are more answers; answers that are missing
(cancelled, failed jobs, a grader that could not tell) are made up for.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from shared.db.faults import sqlstate
from shared.db.session import AsyncDatabase, AsyncWriteSession
from shared.errors import Conflict, InvalidParameter, NotFound, VDiffError
from shared.evaluations import repository, sandbox
from shared.evaluations.dataset_items import (
    DATASETS_TOGETHER,
    READS_TOGETHER,
    Datasets,
    DatasetSource,
    Turn,
)
from shared.evaluations.datasets import DatasetReader, Item, described
from shared.evaluations.graders import TYPES, Grader
from shared.evaluations.requests import (
    Configuration,
    NewEvaluation,
    Prompt,
    parse_prompt,
    sample_seed,
)
from shared.evaluations.sandbox_pool import SandboxPool
from shared.evaluations.status import OPEN, EvaluationStatus, RunStatus
from shared.fair_turns import FairTurns
from shared.files.service import FileService
from shared.ids import may_be_an_id, new_id
from shared.jobs.limits import read_queued, refuse_beyond
from shared.jobs.requests import parse
from shared.jobs.responses import COMPLETIONS
from shared.jobs.service import JobService, Submission
from shared.keys.principal import Principal
from shared.settings import Settings

ITEMS_CHUNK = 500
STORE_TRIES = 3  # that find the same evaluation created or removed meanwhile
UNIQUE_VIOLATION = "23505"

_log = structlog.get_logger(__name__)


class EvaluationNotFound(NotFound):
    code = "evaluation_not_found"


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a request: the evaluation, and the outcome of each configuration."""

    row: Row[Any]
    created: bool
    configurations: list[dict[str, Any]]  # {name, run, reused, new_samples}


@dataclass(frozen=True, slots=True)
class _Checked:
    """A configuration that can run: the model's revision, and the tokens of a job of the first
    item.
    """

    revision: str | None
    tokens: int


class EvaluationService:
    """One per API process. `wake` is set when the caretaker has something to do."""

    def __init__(
        self,
        database: AsyncDatabase,
        jobs: JobService,
        files: FileService,
        datasets: Datasets,
        settings: Settings,
        wake: asyncio.Event,
        sandboxes: SandboxPool,
        lists: AsyncDatabase | None = None,
    ) -> None:
        self._database = database
        self._lists = lists or database
        self._jobs = jobs
        self._files = files
        self._datasets = datasets
        self._settings = settings
        self._wake = wake
        self._sandboxes = sandboxes
        self._held = FairTurns(DATASETS_TOGETHER)
        self._pieces = FairTurns(READS_TOGETHER)

    def options(self) -> dict[str, Any]:
        """Return the choices of a form: bundled datasets, and the graders that are allowed here."""
        graders = [kind for kind in TYPES if kind != "code" or self._settings.code_graders]
        return {
            "object": "evaluation.options",
            "datasets": described(self._datasets),
            "graders": graders,
        }

    async def create(self, new: NewEvaluation, principal: Principal, window_seconds: float) -> Made:
        """Check all of it, what is cheap first, then store it; it is visible when all of it is
        stored.

        The code of graders is compiled here and runs when answers are graded, never before the
        evaluation exists.

        Raises:
            InvalidRequest (its kinds): also of the dataset's lines and of the generation fields.
            FileNotFound, ContentMissing: the file is not there, or went while it was read.
            ModelNotFound, TooManyRequests, SandboxesBusy, LockTimeout.
        """
        await self._check_models(new.configurations, new.prompt, principal)
        source = await DatasetSource.find(new, self._files, self._datasets, principal.tenant)
        await self._check_queue(new.configurations, principal)
        await self._check_code(new.graders, principal.tenant)
        async with self._held.turn(principal.tenant):
            reader = self._reader(new)
            async with aclosing(source.pieces(reader, self._turn(principal))) as pieces:
                async for _ in pieces:
                    pass
            assert reader.first is not None
            checked = await self._check(new.configurations, new.prompt, reader.first, principal)
            content = await asyncio.to_thread(new.content_hash, reader.keys)
            values = {
                "id": new_id("eval"),
                "tenant": principal.tenant,
                "name": new.name,
                "dataset": new.dataset,
                "endpoint": new.prompt.endpoint,
                "template": new.prompt.source,
                "graders": [g.to_json() for g in new.graders],
                "metadata": new.metadata,
                "items": len(reader.keys),
                "window_seconds": window_seconds,
            }

            async def add(session: AsyncWriteSession, row: Row[Any]) -> list[dict[str, Any]]:
                return await self._add(
                    session, row, new.configurations, checked, principal, window_seconds
                )

            row, created, told = await self._store(new, source, values, content, principal, add)
        self._wake.set()
        return Made(await self.get(row.id, principal.tenant), created, told)

    def _turn(self, principal: Principal) -> Turn:
        return functools.partial(self._pieces.turn, principal.tenant)

    async def _store(
        self,
        new: NewEvaluation,
        source: DatasetSource,
        values: dict[str, Any],
        content: str,
        principal: Principal,
        add: Callable[[AsyncWriteSession, Row[Any]], Awaitable[list[dict[str, Any]]]],
    ) -> tuple[Row[Any], bool, list[dict[str, Any]]]:
        """Find the evaluation of this content or store it, and add the configurations to it.

        Items are stored in short transactions, in an evaluation that nobody sees yet. No
        transaction is open while the dataset is read.

        Returns: the evaluation, whether it is new, and what `add` returned.
        """
        who = (principal.tenant, principal.payer)
        stored = shown = False
        try:
            for _ in range(STORE_TRIES):
                async with self._jobs.queue_writes.write(who) as session:
                    found = (
                        await session.execute(repository.by_content(principal.tenant, content))
                    ).one_or_none()
                    if found is not None:
                        return found, False, await add(session, found)
                if not stored:
                    stored = True
                    await self._store_items(values, source, self._reader(new), principal)
                try:
                    async with self._jobs.queue_writes.write(who) as session:
                        row = (
                            await session.execute(repository.show(values["id"], content))
                        ).one_or_none()
                        if row is None:
                            break
                        told = await add(session, row)
                except IntegrityError as exc:
                    if exc.orig is None or sqlstate(exc.orig) != UNIQUE_VIOLATION:
                        raise
                    continue  # the same evaluation was created meanwhile
                shown = True
                return row, True, told
            raise Conflict("the same evaluation is being created or removed; try again")
        finally:
            if stored and not shown:
                await self._discard(values["id"])

    async def _discard(self, evaluation_id: str) -> None:
        """Have a hidden evaluation removed; if this fails, housekeeping does so later."""
        try:
            async with self._database.write() as session:
                await session.execute(repository.discard_hidden(evaluation_id))
        except (SQLAlchemyError, OSError) as exc:
            _log.warning(
                "evaluation_not_discarded", evaluation_id=evaluation_id, error=type(exc).__name__
            )

    def _reader(self, new: NewEvaluation) -> DatasetReader:
        return DatasetReader(new.prompt, new.graders, self._settings.max_batch_lines, new.limit)

    async def _store_items(
        self,
        values: dict[str, Any],
        source: DatasetSource,
        reader: DatasetReader,
        principal: Principal,
    ) -> None:
        """Store a hidden evaluation and its items. Raises Conflict: it was removed meanwhile."""
        async with self._database.write() as session:
            await session.execute(repository.create_hidden(values))
        async with aclosing(source.pieces(reader, self._turn(principal))) as pieces:
            async for items in pieces:
                async with self._database.write() as session:
                    if (
                        await session.execute(repository.keep_hidden(values["id"]))
                    ).one_or_none() is None:
                        raise Conflict("the evaluation took too long to store; try again")
                    for start in range(0, len(items), ITEMS_CHUNK):
                        rows = [
                            _item_row(values["id"], item)
                            for item in items[start : start + ITEMS_CHUNK]
                        ]
                        await session.execute(repository.insert_items(rows))

    async def add(
        self, evaluation_id: str, configurations: Sequence[Configuration], principal: Principal
    ) -> Made:
        """More configurations, or more of one. Raises EvaluationNotFound and what `create` raises
        of configurations.
        """
        row = await self.get(evaluation_id, principal.tenant)
        async with self._database.read() as session:
            first = (await session.execute(repository.items(row.id, 1, 1))).one()
        prompt = parse_prompt(row.template, row.endpoint)
        checked = await self._check(configurations, prompt, first.data, principal)
        async with self._jobs.queue_writes.write((principal.tenant, principal.payer)) as session:
            told = await self._add(
                session, row, configurations, checked, principal, row.window_seconds
            )
        self._wake.set()
        return Made(await self.get(row.id, principal.tenant), False, told)

    async def _check_models(
        self, configurations: Sequence[Configuration], prompt: Prompt, principal: Principal
    ) -> None:
        """Check what needs no row of the dataset: the models and the generation fields."""
        stands_for = (
            {"prompt": "x"}
            if prompt.endpoint == COMPLETIONS
            else {"messages": [{"role": "user", "content": "x"}]}
        )
        for configuration in configurations:
            with _naming(configuration):
                body = {
                    **configuration.fields,
                    "model": configuration.model,
                    **stands_for,
                    "seed": 0,
                }
                request = parse(prompt.endpoint, body, streaming=False)
                await self._jobs.served(request.model, request.endpoint)

    async def _check_queue(
        self, configurations: Sequence[Configuration], principal: Principal
    ) -> None:
        """Refuse early when not even one item would fit. Raises TooManyRequests."""
        count = sum(len(c.seeds) for c in configurations)
        who = (principal.tenant, principal.payer)
        async with self._database.read() as session:
            queued = await read_queued(session, who, principal.limits, lock=False)
        queued.refuse_beyond(jobs=count, tokens=count)

    async def _check_code(self, graders: Sequence[Grader], tenant: str) -> None:
        """Compile the code of all graders in one sandbox. Raises InvalidParameter, SandboxesBusy."""
        of_code = [
            (i, grader.options["source"])
            for i, grader in enumerate(graders)
            if grader.type == "code"
        ]
        if not of_code:
            return
        wrong = await sandbox.check([source for _, source in of_code], self._sandboxes, tenant)
        if wrong is not None:
            at = f"graders[{of_code[wrong.index][0]}].source"
            raise InvalidParameter(f"{at}: {wrong.message}", param=at, code="invalid_grader")

    async def _check(
        self,
        configurations: Sequence[Configuration],
        prompt: Prompt,
        row: Mapping[str, Any],
        principal: Principal,
    ) -> list[_Checked]:
        """Each with the first item, as a job is checked."""
        checked: list[_Checked] = []
        seen: dict[str, Configuration] = {}
        for configuration in configurations:
            submission = submission_of(
                configuration.model, configuration.fields, 0, prompt, row, principal
            )
            with _naming(configuration):
                request = parse(submission.endpoint, submission.body, streaming=False)
                served = await self._jobs.served(request.model, request.endpoint)
                prepared = await asyncio.to_thread(self._jobs.complete, submission, request, served)
            checked.append(_Checked(served[0].card.revision, prepared.values["tokens"]))
            same = seen.setdefault(configuration.content_hash(checked[-1].revision), configuration)
            if same is not configuration:
                message = f"{configuration.at}: {same.at} asks for the same; give one of them the seeds of both"
                raise InvalidParameter(message, param=configuration.at)
        return checked

    async def _add(
        self,
        session: AsyncWriteSession,
        row: Row[Any],
        configurations: Sequence[Configuration],
        checked: Sequence[_Checked],
        principal: Principal,
        window_seconds: float,
    ) -> list[dict[str, Any]]:
        """Add new runs and continue unfinished ones, in the caller's transaction.

        Raises:
            EvaluationNotFound: the evaluation was deleted after the caller read it.
        """
        locked: Row[Any] | None = (await session.execute(repository.lock(row.id))).one_or_none()
        if locked is None:
            raise _not_found(row.id)
        row = locked
        there = list((await session.execute(repository.runs(row.id))).all())
        by_content, names = {run.content_hash: run for run in there}, {run.name for run in there}
        told: list[dict[str, Any]] = []
        tokens = retried = 0
        for configuration, of_first in zip(configurations, checked, strict=True):
            revision = of_first.revision
            content = configuration.content_hash(revision)
            if (run := by_content.get(content)) is not None:
                more_of, again = await self._more(
                    session, row, run, configuration, principal, window_seconds
                )
                told.append(more_of)
                tokens += of_first.tokens * (more_of["new_samples"] - again)
                retried += again
                continue
            name = configuration.name
            if name in names:
                name = _another_name(name, revision, names, configuration, there)
            names.add(name)
            samples = row.items * len(configuration.seeds)
            values = {
                "id": new_id("evalrun"),
                "evaluation_id": row.id,
                "position": len(there) + len(told) + 1,
                "name": name,
                "model": configuration.model,
                "revision": revision,
                "fields": configuration.fields,
                "seeds": list(configuration.seeds),
                "content_hash": content,
                "total": samples,
                "key_id": principal.payer,
            }
            await session.execute(repository.insert_run(values, window_seconds))
            told.append(
                {"name": name, "run": values["id"], "reused": False, "new_samples": samples}
            )
            tokens += of_first.tokens * samples
        more = sum(t["new_samples"] for t in told)
        if more:
            # As if every item were as long as the first: they are not tokenised yet. Those that are
            # longer wait for room when they become jobs. Jobs that were retried are in the queue by
            # now.
            who = (principal.tenant, principal.payer)
            await refuse_beyond(session, who, principal.limits, jobs=more - retried, tokens=tokens)
            await session.execute(repository.reopen(row.id))
        return told

    async def _more(
        self,
        session: AsyncWriteSession,
        row: Row[Any],
        run: Row[Any],
        configuration: Configuration,
        principal: Principal,
        window_seconds: float,
    ) -> tuple[dict[str, Any], int]:
        """Return the missing seeds of a run, its seeds without an answer, and the number of jobs
        queued again for it.
        """
        seeds = [*run.seeds, *(s for s in configuration.seeds if s not in run.seeds)]
        total = row.items * len(seeds)
        missing = total - run.total
        if run.status != RunStatus.IN_PROGRESS:
            forgotten = len((await session.execute(repository.forget_errors(run.id))).all())
            counts = (await session.execute(repository.run_counts(run.id))).one()
            missing = total - counts.graded
            if not forgotten and not missing:
                return {"name": run.name, "run": run.id, "reused": True, "new_samples": 0}, 0
        elif not missing:
            return {"name": run.name, "run": run.id, "reused": True, "new_samples": 0}, 0
        statement = repository.continue_run(
            run.id, key_id=principal.payer, seeds=seeds, total=total, window_seconds=window_seconds
        )
        expires_at = (await session.execute(statement)).scalar_one()
        again = 0
        if run.status != RunStatus.IN_PROGRESS:
            statement = repository.retry_jobs(run.id, expires_at, key_id=principal.payer)
            again = len((await session.execute(statement)).all())
        return {"name": run.name, "run": run.id, "reused": True, "new_samples": missing}, again

    async def get(self, evaluation_id: str, tenant: str) -> Row[Any]:
        """Raises EvaluationNotFound."""
        if may_be_an_id(evaluation_id):
            async with self._database.read() as session:
                row: Row[Any] | None = (
                    await session.execute(repository.get(evaluation_id, tenant))
                ).one_or_none()
            if row is not None:
                return row
        raise _not_found(evaluation_id)

    async def page(
        self, tenant: str, *, after: str | None, limit: int
    ) -> tuple[list[Row[Any]], list[Row[Any]]]:
        """Evaluations, and the runs of all of them."""
        async with self._lists.read() as session:
            statement = repository.list_evaluations(tenant, after=after, limit=limit)
            rows = list((await session.execute(statement)).all())
            runs = (
                list((await session.execute(repository.run_names([row.id for row in rows]))).all())
                if rows
                else []
            )
        return rows, runs

    async def samples(self, evaluation_id: str, tenant: str, **query: Any) -> list[Row[Any]]:
        """Raises EvaluationNotFound, InvalidParameter: no such configuration."""
        await self.get(evaluation_id, tenant)
        if query["configuration"] is not None:
            await self.run(evaluation_id, query["configuration"], "configuration")
        async with self._lists.read() as session:
            return list((await session.execute(repository.samples(evaluation_id, **query))).all())

    async def sample(
        self, evaluation_id: str, tenant: str, *, configuration: str, item: int, repeat: int
    ) -> Row[Any]:
        """One graded answer with its item. Raises EvaluationNotFound, InvalidParameter, NotFound."""
        await self.get(evaluation_id, tenant)
        await self.run(evaluation_id, configuration, "configuration")
        async with self._database.read() as session:
            statement = repository.sample(evaluation_id, configuration, item, repeat)
            row: Row[Any] | None = (await session.execute(statement)).one_or_none()
        if row is None:
            raise NotFound(
                f"item {item} has no graded answer {repeat} of that configuration", param="item"
            )
        return row

    async def run(self, evaluation_id: str, name: str, param: str) -> Any:
        """A configuration by its name. Raises InvalidParameter."""
        async with self._lists.read() as session:
            runs = (await session.execute(repository.runs(evaluation_id))).all()
        for run in runs:
            if run.name == name:
                return run
        known = ", ".join(repr(run.name) for run in runs)
        raise InvalidParameter(
            f"{param}: there is no configuration {name[:80]!r}; there are: {known[:500]}",
            param=param,
        )

    async def cancel(self, evaluation_id: str, tenant: str) -> Row[Any]:
        """Ask for an end; what is over stays as it is. Raises EvaluationNotFound."""
        await self.get(evaluation_id, tenant)
        async with self._database.write() as session:
            await session.execute(repository.request_cancel(evaluation_id))
        self._wake.set()
        return await self.get(evaluation_id, tenant)

    async def remove(self, evaluation_id: str, tenant: str) -> None:
        """With its samples; the jobs stay, as jobs do. Raises EvaluationNotFound, Conflict: it
        runs.
        """
        row = await self.get(evaluation_id, tenant)
        async with self._database.write() as session:
            gone = (await session.execute(repository.remove(evaluation_id))).one_or_none()
        if gone is None and EvaluationStatus(row.status) in OPEN:
            raise Conflict("the evaluation is running; cancel it first", code="evaluation_not_over")


def _not_found(evaluation_id: str) -> EvaluationNotFound:
    return EvaluationNotFound(f"no evaluation {evaluation_id[:80]!r}", param="evaluation_id")


@contextmanager
def _naming(configuration: Configuration) -> Iterator[None]:
    """Name the configuration in the errors of its fields."""
    try:
        yield
    except VDiffError as exc:
        if exc.param is not None and exc.param.split("[")[0] not in ("messages", "prompt"):
            exc.param = f"{configuration.at}.{exc.param}"
        exc.message = f"{configuration.at} ({configuration.name}): {exc.message}"
        raise


def submission_of(
    model: str,
    fields: Mapping[str, Any],
    seed: int,
    prompt: Prompt,
    row: Mapping[str, Any],
    principal: Principal,
    **more: Any,
) -> Submission:
    """The job of one answer. Raises MissingColumn."""
    body = {**fields, "model": model, **prompt.body(row), "seed": seed}
    return Submission(endpoint=prompt.endpoint, body=body, principal=principal, **more)


def _item_row(evaluation_id: str, item: Item) -> dict[str, Any]:
    return {
        "evaluation_id": evaluation_id,
        "number": item.number,
        "line": item.line,
        "key": item.key,
        "cluster": item.cluster,
        "data": item.data,
    }


def _another_name(
    name: str,
    revision: str | None,
    names: set[str],
    configuration: Configuration,
    there: Sequence[Row[Any]],
) -> str:
    """The same configuration on another revision of the model has the revision behind its name;
    else the name is taken.
    """
    same = any(
        run.name == name and run.model == configuration.model and run.fields == configuration.fields
        for run in there
    )
    other = f"{name}@{(revision or 'none')[:8]}"
    if same and other not in names:
        return other
    message = f"{configuration.at}.name: the evaluation has another configuration called {name!r}"
    raise Conflict(message, param=f"{configuration.at}.name", code="configuration_name_taken")


__all__ = [
    "Datasets",
    "EvaluationNotFound",
    "EvaluationService",
    "Made",
    "sample_seed",
    "submission_of",
]
