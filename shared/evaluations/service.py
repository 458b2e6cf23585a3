"""Evaluations as requests see them: created, added to, looked at, cancelled, removed. What takes long is the caretaker's.

The same dataset, template and graders are the same evaluation, whatever it is called: creating it again adds what is new to
the one that is there, and a configuration that it has (same model, revision and fields) is not run again. More seeds of one
are more answers; answers that are missing (cancelled, failed jobs, a grader that could not tell) are made up for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from shared.db.session import AsyncDatabase, AsyncWriteSession
from shared.errors import Conflict, InvalidParameter, NotFound, VDiffError
from shared.evaluations import repository, sandbox
from shared.evaluations.datasets import DatasetReader, Item, bundled_rows, described
from shared.evaluations.graders import TYPES, Grader
from shared.evaluations.requests import Configuration, NewEvaluation, Prompt, parse_prompt, sample_seed
from shared.evaluations.status import OPEN, EvaluationStatus, RunStatus
from shared.files.service import FileService
from shared.files.store import ContentMissing
from shared.ids import may_be_an_id, new_id
from shared.jobs.limits import refuse_beyond
from shared.jobs.requests import parse
from shared.jobs.service import JobService, Submission
from shared.keys.principal import Principal
from shared.settings import Settings

ITEMS_CHUNK = 500
Datasets = Mapping[str, Callable[[], list[dict[str, Any]]]]


class EvaluationNotFound(NotFound):
    code = "evaluation_not_found"


@dataclass(frozen=True, slots=True)
class Made:
    """What a request led to: the evaluation, and per configuration what became of it."""

    row: Row[Any]
    created: bool
    configurations: list[dict[str, Any]]  # {name, run, reused, new_samples}


@dataclass(frozen=True, slots=True)
class _Checked:
    """A configuration that can run: the model's revision, and the tokens of a job of the first item."""

    revision: str | None
    tokens: int


class EvaluationService:
    """One per API process. `wake` is set when the caretaker has something to do."""

    def __init__(
        self, database: AsyncDatabase, jobs: JobService, files: FileService, datasets: Datasets, settings: Settings,
        wake: asyncio.Event,
    ) -> None:  # fmt: skip
        self._database = database
        self._jobs = jobs
        self._files = files
        self._datasets = datasets
        self._settings = settings
        self._wake = wake

    def options(self) -> dict[str, Any]:
        """What a form offers: bundled datasets, and the graders that are allowed here."""
        graders = [kind for kind in TYPES if kind != "code" or self._settings.code_graders]
        return {"object": "evaluation.options", "datasets": described(self._datasets), "graders": graders}

    async def create(self, new: NewEvaluation, principal: Principal, window_seconds: float) -> Made:
        """Check all of it, then store it in one transaction.

        Raises:
            InvalidRequest (its kinds): also of the dataset's lines and of the generation fields.
            FileNotFound, ContentMissing: the file is not there, or went while it was read.
            ModelNotFound, TooManyRequests.
        """
        for i, grader in enumerate(new.graders):
            await self._check_code(grader, f"graders[{i}]")
        items = await self._items(new, principal.tenant)
        checked = await self._check(new.configurations, new.prompt, items[0].data, principal)
        content = await asyncio.to_thread(new.content_hash, [item.key for item in items])
        values = {
            "id": new_id("eval"), "tenant": principal.tenant, "name": new.name, "content_hash": content,
            "dataset": new.dataset, "endpoint": new.prompt.endpoint, "template": new.prompt.source,
            "graders": [g.to_json() for g in new.graders], "metadata": new.metadata, "items": len(items),
            "window_seconds": window_seconds,
        }  # fmt: skip
        async with self._database.write() as session:
            row = (await session.execute(repository.create(values))).one_or_none()
            created = row is not None
            if row is None:
                row = (await session.execute(repository.by_content(principal.tenant, content))).one_or_none()
                if row is None:  # removed just then
                    raise Conflict("the same evaluation is being removed; try again")
            else:
                for start in range(0, len(items), ITEMS_CHUNK):
                    rows = [_item_row(row.id, item) for item in items[start : start + ITEMS_CHUNK]]
                    await session.execute(repository.insert_items(rows))
            told = await self._add(session, row, new.configurations, checked, principal, window_seconds)
        self._wake.set()
        return Made(await self.get(row.id, principal.tenant), created, told)

    async def add(self, evaluation_id: str, configurations: Sequence[Configuration], principal: Principal) -> Made:
        """More configurations, or more of one. Raises EvaluationNotFound and what `create` raises of configurations."""
        row = await self.get(evaluation_id, principal.tenant)
        async with self._database.read() as session:
            first = (await session.execute(repository.items(row.id, 1, 1))).one()
        prompt = parse_prompt(row.template, row.endpoint)
        checked = await self._check(configurations, prompt, first.data, principal)
        async with self._database.write() as session:
            told = await self._add(session, row, configurations, checked, principal, row.window_seconds)
        self._wake.set()
        return Made(await self.get(row.id, principal.tenant), False, told)

    async def _check_code(self, grader: Grader, at: str) -> None:
        if grader.type == "code" and (wrong := await sandbox.check(grader)) is not None:
            raise InvalidParameter(f"{at}.source: {wrong}", param=f"{at}.source", code="invalid_grader")

    async def _items(self, new: NewEvaluation, tenant: str) -> list[Item]:
        reader = DatasetReader(new.prompt, new.graders, self._settings.max_batch_lines, new.limit)
        if new.bundled is not None:
            rows = bundled_rows(dict(self._datasets), new.bundled)
            for line, row in enumerate(rows[: new.limit], 1):
                reader.add(row, line)
            return reader.items
        assert new.file_id is not None
        file = await self._files.get(new.file_id, tenant, param="dataset.file_id")
        if file.purpose not in ("evals", "batch"):
            message = f"{file.id} was uploaded for {file.purpose}; a dataset has purpose evals"
            raise InvalidParameter(message, param="dataset.file_id")
        try:
            async for data in self._files.read(file):
                await asyncio.to_thread(reader.feed, data)
                if reader.full:
                    break
            return await asyncio.to_thread(reader.finish)
        except ContentMissing as exc:
            exc.param = "dataset.file_id"
            raise

    async def _check(
        self, configurations: Sequence[Configuration], prompt: Prompt, row: Mapping[str, Any], principal: Principal
    ) -> list[_Checked]:
        """Each with the first item, as a job is checked."""
        checked: list[_Checked] = []
        seen: dict[str, Configuration] = {}
        for configuration in configurations:
            submission = submission_of(configuration.model, configuration.fields, 0, prompt, row, principal)
            try:
                request = parse(submission.endpoint, submission.body, streaming=False)
                served = await self._jobs.served(request.model, request.endpoint)
                prepared = await asyncio.to_thread(self._jobs.complete, submission, request, served)
            except VDiffError as exc:
                if exc.param is not None and exc.param.split("[")[0] not in ("messages", "prompt"):
                    exc.param = f"{configuration.at}.{exc.param}"
                exc.message = f"{configuration.at} ({configuration.name}): {exc.message}"
                raise
            checked.append(_Checked(served[0].card.revision, prepared.values["tokens"]))
            same = seen.setdefault(configuration.content_hash(checked[-1].revision), configuration)
            if same is not configuration:
                message = f"{configuration.at}: {same.at} asks for the same; give one of them the seeds of both"
                raise InvalidParameter(message, param=configuration.at)
        return checked

    async def _add(
        self, session: AsyncWriteSession, row: Row[Any], configurations: Sequence[Configuration],
        checked: Sequence[_Checked], principal: Principal, window_seconds: float,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """In the caller's transaction: what is new becomes runs, what is not done yet goes on."""
        row = (await session.execute(repository.lock(row.id))).one()
        there = list((await session.execute(repository.runs(row.id))).all())
        by_content, names = {run.content_hash: run for run in there}, {run.name for run in there}
        told: list[dict[str, Any]] = []
        tokens = 0
        for configuration, of_first in zip(configurations, checked, strict=True):
            revision = of_first.revision
            content = configuration.content_hash(revision)
            if (run := by_content.get(content)) is not None:
                told.append(await self._more(session, row, run, configuration, principal, window_seconds))
                tokens += of_first.tokens * told[-1]["new_samples"]
                continue
            name = configuration.name
            if name in names:
                name = _another_name(name, revision, names, configuration, there)
            names.add(name)
            samples = row.items * len(configuration.seeds)
            values = {
                "id": new_id("evalrun"), "evaluation_id": row.id, "position": len(there) + len(told) + 1, "name": name,
                "model": configuration.model, "revision": revision, "fields": configuration.fields,
                "seeds": list(configuration.seeds), "content_hash": content, "total": samples, "key_id": principal.payer,
            }  # fmt: skip
            await session.execute(repository.insert_run(values, window_seconds))
            told.append({"name": name, "run": values["id"], "reused": False, "new_samples": samples})
            tokens += of_first.tokens * samples
        more = sum(t["new_samples"] for t in told)
        if more:
            # As if every item were as long as the first: they are not tokenised yet.
            who = (principal.tenant, principal.payer)
            await refuse_beyond(session, who, principal.limits, jobs=more, tokens=tokens)
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
    ) -> dict[str, Any]:
        """What a run lacks: seeds that it has not, and answers that are none."""
        seeds = [*run.seeds, *(s for s in configuration.seeds if s not in run.seeds)]
        total = row.items * len(seeds)
        missing = total - run.total
        if run.status != RunStatus.IN_PROGRESS:
            forgotten = len((await session.execute(repository.forget_errors(run.id))).all())
            counts = (await session.execute(repository.run_counts(run.id))).one()
            missing = total - counts.graded
            if not forgotten and not missing:
                return {"name": run.name, "run": run.id, "reused": True, "new_samples": 0}
        elif not missing:
            return {"name": run.name, "run": run.id, "reused": True, "new_samples": 0}
        statement = repository.continue_run(
            run.id, key_id=principal.payer, seeds=seeds, total=total, window_seconds=window_seconds
        )
        expires_at = (await session.execute(statement)).scalar_one()
        if run.status != RunStatus.IN_PROGRESS:
            await session.execute(repository.retry_jobs(run.id, expires_at, key_id=principal.payer))
        return {"name": run.name, "run": run.id, "reused": True, "new_samples": missing}

    async def get(self, evaluation_id: str, tenant: str) -> Row[Any]:
        """Raises EvaluationNotFound."""
        if may_be_an_id(evaluation_id):
            async with self._database.read() as session:
                row: Row[Any] | None = (await session.execute(repository.get(evaluation_id, tenant))).one_or_none()
            if row is not None:
                return row
        raise EvaluationNotFound(f"no evaluation {evaluation_id[:80]!r}", param="evaluation_id")

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Row[Any]], list[Row[Any]]]:
        """Evaluations, and the runs of all of them."""
        async with self._database.read() as session:
            statement = repository.list_evaluations(tenant, after=after, limit=limit)
            rows = list((await session.execute(statement)).all())
            runs = list((await session.execute(repository.run_names([row.id for row in rows]))).all()) if rows else []
        return rows, runs

    async def samples(self, evaluation_id: str, tenant: str, **query: Any) -> list[Row[Any]]:
        """Raises EvaluationNotFound, InvalidParameter: no such configuration."""
        await self.get(evaluation_id, tenant)
        if query["configuration"] is not None:
            await self.run(evaluation_id, query["configuration"], "configuration")
        async with self._database.read() as session:
            return list((await session.execute(repository.samples(evaluation_id, **query))).all())

    async def sample(self, evaluation_id: str, tenant: str, *, configuration: str, item: int, repeat: int) -> Row[Any]:
        """One graded answer with its item. Raises EvaluationNotFound, InvalidParameter, NotFound."""
        await self.get(evaluation_id, tenant)
        await self.run(evaluation_id, configuration, "configuration")
        async with self._database.read() as session:
            statement = repository.sample(evaluation_id, configuration, item, repeat)
            row: Row[Any] | None = (await session.execute(statement)).one_or_none()
        if row is None:
            raise NotFound(f"item {item} has no graded answer {repeat} of that configuration", param="item")
        return row

    async def run(self, evaluation_id: str, name: str, param: str) -> Any:
        """A configuration by its name. Raises InvalidParameter."""
        async with self._database.read() as session:
            runs = (await session.execute(repository.runs(evaluation_id))).all()
        for run in runs:
            if run.name == name:
                return run
        known = ", ".join(repr(run.name) for run in runs)
        raise InvalidParameter(
            f"{param}: there is no configuration {name[:80]!r}; there are: {known[:500]}", param=param
        )

    async def cancel(self, evaluation_id: str, tenant: str) -> Row[Any]:
        """Ask for an end; what is over stays as it is. Raises EvaluationNotFound."""
        await self.get(evaluation_id, tenant)
        async with self._database.write() as session:
            await session.execute(repository.request_cancel(evaluation_id))
        self._wake.set()
        return await self.get(evaluation_id, tenant)

    async def remove(self, evaluation_id: str, tenant: str) -> None:
        """With its samples; the jobs stay, as jobs do. Raises EvaluationNotFound, Conflict: it runs."""
        row = await self.get(evaluation_id, tenant)
        async with self._database.write() as session:
            gone = (await session.execute(repository.remove(evaluation_id))).one_or_none()
        if gone is None and EvaluationStatus(row.status) in OPEN:
            raise Conflict("the evaluation is running; cancel it first", code="evaluation_not_over")


def submission_of(
    model: str, fields: Mapping[str, Any], seed: int, prompt: Prompt, row: Mapping[str, Any], principal: Principal,
    **more: Any,
) -> Submission:  # fmt: skip
    """The job of one answer. Raises MissingColumn."""
    body = {**fields, "model": model, **prompt.body(row), "seed": seed}
    return Submission(endpoint=prompt.endpoint, body=body, principal=principal, **more)


def _item_row(evaluation_id: str, item: Item) -> dict[str, Any]:
    return {
        "evaluation_id": evaluation_id, "number": item.number, "line": item.line, "key": item.key,
        "cluster": item.cluster, "data": item.data,
    }  # fmt: skip


def _another_name(
    name: str, revision: str | None, names: set[str], configuration: Configuration, there: Sequence[Row[Any]]
) -> str:
    """The same configuration on another revision of the model has the revision behind its name; else the name is taken."""
    same = any(
        run.name == name and run.model == configuration.model and run.fields == configuration.fields for run in there
    )
    other = f"{name}@{(revision or 'none')[:8]}"
    if same and other not in names:
        return other
    message = f"{configuration.at}.name: the evaluation has another configuration called {name!r}"
    raise Conflict(message, param=f"{configuration.at}.name", code="configuration_name_taken")


__all__ = ["Datasets", "EvaluationNotFound", "EvaluationService", "Made", "sample_seed", "submission_of"]
