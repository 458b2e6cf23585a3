"""Submission, waiting and cancellation of jobs: the same code for native jobs and for OpenAI's
endpoints.

    prepared = await service.prepare(submission)     checked, tokenised, parameters and seed frozen
    waiter.register(prepared.id)                     only if somebody waits
    accepted = await service.enqueue(prepared)       INSERT, COMMIT, then push

The row is the job: once it is committed, a lost push costs seconds (the sweeper pushes again),
never the job.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Row, func
from sqlalchemy.exc import SQLAlchemyError

from shared import tracing
from shared.db.serial import SerialWrites
from shared.db.session import AsyncDatabase, AsyncWriteSession, is_outage
from shared.errors import Conflict, Gone, IdempotencyMismatch, InvalidParameter, JobNotFound
from shared.events import GATHER_SECONDS, events_key, left_key, publish_cancel, publish_done
from shared.ids import is_id, new_id
from shared.jobs import lanes, queries, repository
from shared.jobs.bodies import Request, parse
from shared.jobs.deadlines import Deadlines
from shared.jobs.formats import ROW_FORMAT
from shared.jobs.limits import refuse_beyond
from shared.jobs.membership import refuse_part_of_open
from shared.jobs.requests import ParsedRequest
from shared.jobs.response_requests import ResponseRequest, job_id_of, next_messages
from shared.jobs.responses import CHAT, RESPONSES
from shared.jobs.status import TERMINAL, JobStatus, Priority
from shared.jobs.tasks import ResponseTask, task_of
from shared.jobs.turns import Who
from shared.keys.principal import Limits, Principal
from shared.queue.window import REDIS_SECONDS, PushWindow
from shared.served_models import ServedModel, ServedModels
from shared.settings import Settings
from shared.tokenizer import TokenizerWrapper
from shared.vault import vault_of
from shared.watch import JobWatch
from shared.webhooks import repository as webhooks
from shared.webhooks.secrets import new_secret

_log = structlog.get_logger(__name__)

RETRY_WINDOW_SECONDS = 600  # in which an SDK's automatic retry attaches to the job of the first try
THREAD_CHARACTERS = 20_000  # longer prompts are tokenised in a thread
_SEED_BITS = 53  # every JSON reader holds such integers exactly

Served = tuple[ServedModel, TokenizerWrapper]


@dataclass(frozen=True, slots=True)
class Submission:
    """A client's request before it is checked."""

    endpoint: str
    body: Any
    principal: Principal
    priority: Priority = Priority.NORMAL
    custom_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    deadlines: Deadlines = field(default_factory=Deadlines)
    webhook: dict[str, Any] | None = None
    idempotency_key: str | None = None
    automatic_retry: bool = False  # an SDK sent the same request before
    streaming: bool = False  # whether the body may ask for a stream


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked job with its id, not yet stored."""

    id: str
    request: Request
    values: dict[str, Any]
    automatic_retry: bool
    limits: Limits

    @property
    def repeatable(self) -> bool:
        """Return whether the same request gives the same answer, so that another call's would do:
        it names a seed, or nothing in it is drawn.
        """
        body, params = self.values["body"], self.values["params"]
        diffusion = params.get("diffusion") or {}
        drawn = (
            params.get("temperature") != 0
            or diffusion.get("algorithm") == "random"
            or diffusion.get("alg_temp")
        )
        return body.get("seed") is not None or not drawn


@dataclass(frozen=True, slots=True)
class Accepted:
    id: str
    created: bool  # False: attached to a job that was there


class JobService:
    """Accepts, reads and cancels jobs; one per API process."""

    def __init__(
        self,
        database: AsyncDatabase,
        client: redis.asyncio.Redis,
        models: ServedModels,
        waiter: JobWatch,
        settings: Settings,
    ) -> None:
        self._database = database
        self._redis = client
        self._models = models
        self._waiter = waiter
        self._reading: dict[tuple[str, str], asyncio.Task[Row[Any]]] = {}
        self._settings = settings
        self._vault = vault_of(settings.secret_keys)
        self._window = PushWindow(client)
        self._with_secret: set[str] = set()  # tenants without keys whose signing secret exists
        self.queue_writes = SerialWrites(database, "the queue of this key")  # by (tenant, key)

    async def prepare(self, submission: Submission) -> Prepared:
        """Check everything that can be wrong.

        Raises:
            InvalidRequest (its kinds), ModelNotFound: with the field's full name in `param`.
        """
        submission.deadlines.refuse_passed(datetime.now(UTC))
        request = parse(submission.endpoint, submission.body, streaming=submission.streaming)
        served = await self.served(request.model, request.endpoint)
        if isinstance(request, ResponseRequest):
            request = await self._continued(request, submission.principal.tenant)
        compiles = (
            isinstance(request, ParsedRequest | ResponseRequest)
            and "response_format" in request.fields
        )
        if compiles or request.characters > THREAD_CHARACTERS:
            prepared = await asyncio.to_thread(self.complete, submission, request, served)
        else:
            prepared = self.complete(submission, request, served)
        prepared.values["webhook"] = await self._webhook(submission)
        return prepared

    async def _continued(self, request: ResponseRequest, tenant: str) -> ResponseRequest:
        """The request with what was said before it. Raises InvalidParameter: no such response, or
        it has no answer.
        """
        if request.previous is None:
            return request
        try:
            row = await self.get(job_id_of(request.previous), tenant)
        except JobNotFound:
            row = None
        task = None if row is None else task_of(row.params)  # of a purged job nothing is left
        if row is None or not isinstance(task, ResponseTask) or not task.shown["store"]:
            raise InvalidParameter(
                f"there is no response {request.previous}",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if row.status != JobStatus.SUCCEEDED:
            message = f"{request.previous} has no answer to go on from: its job is {row.status}"
            raise InvalidParameter(message, param="previous_response_id")
        return request.continuing(next_messages(task, row.result["output"]))

    async def served(self, model_name: str, endpoint: str) -> Served:
        """The model with its tokenizer. Raises ModelNotFound, InvalidParameter (it does not serve
        the endpoint).
        """
        model = await self._models.get(model_name)
        endpoints = model.card.capabilities.get("endpoints", ())
        if endpoint not in endpoints:
            reason = " has no chat template: it" if endpoint in (CHAT, RESPONSES) else ""
            raise InvalidParameter(
                f"{model.name}{reason} serves {', '.join(endpoints)} only", param="endpoint"
            )
        return model, await self._models.tokenizer(model)

    def complete(self, submission: Submission, request: Request, served: Served) -> Prepared:
        """Finish `prepare` once the model is known. Any thread may call it."""
        model, tokenizer = served
        resolved = request.resolve(model.card, tokenizer)
        if resolved.params.seed is None:
            # A second attempt must give the same answer.
            resolved = replace(
                resolved, params=resolved.params.with_seed(secrets.randbits(_SEED_BITS))
            )
        values = {
            "id": new_id("job"),
            "tenant": submission.principal.tenant,
            "key_id": submission.principal.payer,
            "format": ROW_FORMAT,
            "endpoint": request.endpoint,
            "model": model.name,
            "priority": submission.priority.value,
            "custom_id": submission.custom_id,
            "metadata": {**request.metadata, **submission.metadata},
            "idempotency_key": submission.principal.scoped(submission.idempotency_key),
            "request_hash": _hash(submission),
            "body": submission.body,
            "params": resolved.params_json(),
            "prompt_token_ids": resolved.prompt_token_ids,
            "tokens": resolved.tokens,
            "max_attempts": self._settings.max_attempts,
            **submission.deadlines.columns(),
            "webhook": None,
            "traceparent": tracing.current(),
        }
        limits = submission.principal.limits
        return Prepared(values["id"], request, values, submission.automatic_retry, limits)

    async def _webhook(self, submission: Submission) -> dict[str, Any] | None:
        """The job's webhook, with whose secret signs it. Raises InvalidParameter: no such endpoint."""
        webhook, who = submission.webhook, submission.principal
        if webhook is None:
            return None
        if "endpoint_id" in webhook:
            async with self._database.read() as session:
                statement = webhooks.get_endpoint(webhook["endpoint_id"], who.tenant)
                if (await session.execute(statement)).one_or_none() is None:
                    raise InvalidParameter(
                        "webhook.endpoint_id: no such endpoint", param="webhook.endpoint_id"
                    )
        elif who.key_id is None and who.tenant not in self._with_secret:
            async with self._database.write() as session:
                await session.execute(
                    webhooks.ensure_secret(who.tenant, self._vault.seal(new_secret()))
                )
            self._with_secret.add(who.tenant)
        return webhook if who.key_id is None else {**webhook, "key_id": who.key_id}

    async def enqueue(self, prepared: Prepared) -> Accepted:
        """Store the job and push its message; or attach to the one that this request made before.

        Raises:
            IdempotencyMismatch: the key was used with another body.
            Gone: the key's job was purged.
            TooManyRequests: too many queued jobs.
            LockTimeout: the key's other requests took too long.
        """
        values = prepared.values
        for _ in range(3):
            if (found := await self._earlier(prepared)) is not None:
                _log.info("job_attached", job_id=found)
                return Accepted(found, created=False)
            with tracing.span(
                "vdiff.enqueue", kind="PRODUCER", job_id=values["id"], model=values["model"]
            ):
                created = await self._insert(values, prepared.limits)
            if created:
                _log.info(
                    "job_accepted",
                    job_id=prepared.id,
                    model=values["model"],
                    endpoint=values["endpoint"],
                )
                return Accepted(prepared.id, created=True)
            # Lost a race for the key: the winner's row is there now (or its key was freed just
            # then).
        raise Conflict(
            "the Idempotency-Key is being used by another request; try again",
            param="Idempotency-Key",
        )

    async def _insert(self, values: dict[str, Any], limits: Limits) -> bool:
        """Store the row and push its message, or leave that to the dispatcher; False when the key
        is taken.

        Raises TooManyRequests, LockTimeout.
        """
        model, priority = values["model"], values["priority"]
        push = await self._window.reserve(model, priority)
        try:
            # Written before the push, so that the usual case needs no second UPDATE; unset when the
            # push fails. The database's moment: by the clock of a machine that is ahead, a lost
            # message would be missed too late.
            values = {**values, "pushed_at": func.now() if push else None}
            who = (values["tenant"], values["key_id"])
            async with self._adding(who, limits) as session:
                await refuse_beyond(session, who, limits, jobs=1, tokens=values["tokens"])
                created = (await session.execute(queries.insert_job(values))).one_or_none()
            if created is None:
                return False
            if push and not await self._window.push(values["id"], model, priority):
                async with self._database.write() as session:
                    await session.execute(lanes.untake([values["id"]]))
        finally:
            if push:
                self._window.release(model, priority)
        if not push:
            await self._window.leave(model, priority)
        return True

    def _adding(self, who: Who, limits: Limits) -> AbstractAsyncContextManager[AsyncWriteSession]:
        """Open a transaction that adds to a queue. Keys without limits need not wait for each
        other's requests.
        """
        return self.queue_writes.write(who) if limits.of_queue else self._database.write()

    async def announce(self, model: str, priority: Priority) -> None:
        """Jobs were stored without a message: the dispatchers need not find them by looking."""
        await self._window.leave(model, priority.value)

    async def _earlier(self, prepared: Prepared) -> str | None:
        values = prepared.values
        key = values["idempotency_key"]
        if key is not None:
            async with self._database.read() as session:
                row = (
                    await session.execute(queries.by_idempotency_key(values["tenant"], key))
                ).one_or_none()
            if row is None:
                return None
            refuse_purged(row)  # with the prompt went what the request could be compared with
            if row.request_hash != values["request_hash"]:
                raise IdempotencyMismatch(
                    f"this Idempotency-Key was used with another body, for job {row.id}",
                    param="Idempotency-Key",
                )
            return str(row.id)
        if prepared.automatic_retry:
            statement = queries.same_request(
                values["tenant"], values["key_id"], values["request_hash"], RETRY_WINDOW_SECONDS
            )
            async with self._database.read() as session:
                made = (await session.execute(statement)).all()
            return await self._whose_answer_was_lost(made, prepared) if made else None
        return None

    async def _whose_answer_was_lost(
        self, made: Sequence[Row[Any]], prepared: Prepared
    ) -> str | None:
        """Find the job created by the call that is being retried.

        It is one that its client left. Failing that, where the same request gives the same answer
        any will do; otherwise several calls may have made it that want an answer each, and it is
        one that runs and for which nobody waits any more.
        """
        try:
            pipe = self._redis.pipeline(transaction=False)
            for row in made:
                pipe.getdel(left_key(row.id))
            async with asyncio.timeout(REDIS_SECONDS):
                marks = await pipe.execute()
            for row, left in zip(made, marks, strict=True):
                if left is not None:
                    return str(row.id)
        except (RedisError, OSError, TimeoutError) as exc:
            _log.warning("left_jobs_not_read", error=type(exc).__name__)
        if prepared.repeatable:
            return str(made[0].id)
        for row in made:
            if row.status not in TERMINAL and await self._waiter.waits_anywhere(row.id) is False:
                return str(row.id)
        return None

    async def made_before(self, submission: Submission) -> str | None:
        """The job that this same request made under its Idempotency-Key; also when the request
        would not be accepted any more, because a deadline passed since, or the model or the
        endpoint that it names went.
        """
        principal, key = submission.principal, submission.idempotency_key
        if key is None:
            return None
        statement = queries.by_idempotency_key(principal.tenant, principal.scoped(key) or "")
        async with self._database.read() as session:
            row = (await session.execute(statement)).one_or_none()
        return None if row is None or row.request_hash != _hash(submission) else str(row.id)

    async def get(self, job_id: str, tenant: str) -> Row[Any]:
        """The job's row. Raises JobNotFound."""
        if is_id(job_id, "job"):
            async with self._database.read() as session:
                row: Row[Any] | None = (
                    await session.execute(queries.get(job_id, tenant))
                ).one_or_none()
            if row is not None:
                return row
        raise JobNotFound(f"no job {job_id[:80]!r}", param="job_id")

    async def get_shared(self, job_id: str, tenant: str) -> Row[Any]:
        """Return what `get` does; callers that the same message woke share one query. Raises
        JobNotFound.
        """
        task = self._reading.get((job_id, tenant))
        if task is None:

            async def read() -> Row[Any]:
                await asyncio.sleep(GATHER_SECONDS)
                del self._reading[
                    job_id, tenant
                ]  # a caller that comes from now on may know of a later change
                return await self.get(job_id, tenant)

            task = self._reading[job_id, tenant] = asyncio.create_task(read())
            task.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # its callers may be gone
        return await asyncio.shield(task)

    async def wait(self, job_id: str, seconds: float, tenant: str) -> Row[Any]:
        """The row once the job is over, or as it is after `seconds`. Raises JobNotFound."""
        if seconds <= 0:
            return await self.get(job_id, tenant)
        row: Row[Any] | None = None

        async def read() -> Row[Any]:
            """Return the row as it was while the database is away: the job is there, and its client
            can go on waiting.
            """
            nonlocal row
            try:
                row = await self.get_shared(job_id, tenant)
            except (SQLAlchemyError, OSError) as exc:
                if row is None or not is_outage(exc):
                    raise
                _log.warning("job_not_reread", job_id=job_id, error=type(exc).__name__)
            return row

        return await self._waiter.wait_for(job_id, read, is_done=is_over, timeout_seconds=seconds)

    async def retry(
        self, job_id: str, principal: Principal, deadlines: Deadlines | None = None
    ) -> Row[Any]:
        """Another life for a job that failed, was cancelled or expired.

        Raises:
            JobNotFound, Gone, TooManyRequests, LockTimeout.
            Conflict: it succeeded (replay it), or is not over, or the batch or evaluation that it
                is part of is not.
        """
        row = await self.get(job_id, principal.tenant)
        refuse_purged(row)
        columns = None if deadlines is None else deadlines.columns()
        who = (principal.tenant, principal.payer)
        async with self._adding(who, principal.limits) as session:
            await refuse_part_of_open(session, row)
            await refuse_beyond(session, who, principal.limits, jobs=1, tokens=row.tokens)
            statement = repository.retry(
                job_id, principal.tenant, key_id=principal.payer, deadlines=columns
            )
            moved = (await session.execute(statement)).one_or_none()
        if moved is None:
            row = await self.get(job_id, principal.tenant)
            if row.status == JobStatus.SUCCEEDED:
                raise Conflict(
                    "the job succeeded, which is final; replay makes a new job of it",
                    code="job_succeeded",
                )
            raise Conflict(
                f"the job is {row.status}; only a job that is over can be retried",
                code="job_not_done",
            )
        await self._window.leave(moved.model, moved.priority)  # behind those that wait
        return await self.get(job_id, principal.tenant)

    async def prepare_replay(
        self,
        job_id: str,
        principal: Principal,
        *,
        idempotency_key: str | None = None,
        automatic_retry: bool = False,
    ) -> Prepared:
        """A new job that asks for the same again: prompt, parameters, seed, revision of the model.

        Args:
            idempotency_key, automatic_retry: as of a `Submission`; the request is the same when it
                replays the same job.

        Raises:
            JobNotFound, Gone.
            Conflict: it did not succeed, or the model that is served now is another revision.
        """
        row = None
        if is_id(job_id, "job"):
            async with self._database.read() as session:
                row = (
                    await session.execute(queries.for_replay(job_id, principal.tenant))
                ).one_or_none()
        if row is None:
            raise JobNotFound(f"no job {job_id[:80]!r}", param="job_id")
        refuse_purged(row)
        if row.status != JobStatus.SUCCEEDED:
            raise Conflict(
                f"the job is {row.status}; only one that succeeded can be replayed",
                code="job_not_succeeded",
            )
        model = await self._models.get(row.model)
        if model.card.revision != row.revision:
            message = f"{row.model} is served in revision {model.card.revision} now, the job ran on {row.revision}"
            raise Conflict(message, code="model_revision_changed")
        values = {
            "id": new_id("job"),
            "key_id": principal.payer,
            "format": ROW_FORMAT,
            **{
                name: getattr(row, name)
                for name in (
                    "tenant",
                    "endpoint",
                    "model",
                    "priority",
                    "custom_id",
                    "metadata",
                    "body",
                    "params",
                    "prompt_token_ids",
                    "tokens",
                    "max_attempts",
                    "retain_seconds",
                )
            },
            "idempotency_key": principal.scoped(idempotency_key),
            "request_hash": hashlib.sha256(f"replay of {row.id}".encode()).hexdigest(),
            "pinned_revision": row.revision,
            "replay_of": row.id,
            "traceparent": tracing.current(),
        }
        request = parse(row.endpoint, row.body, streaming=True)
        return Prepared(values["id"], request, values, automatic_retry, principal.limits)

    async def body(self, job_id: str, tenant: str) -> dict[str, Any]:
        """The request as it was sent. Raises JobNotFound, Gone."""
        async with self._database.read() as session:
            row = (await session.execute(queries.for_replay(job_id, tenant))).one_or_none()
        if row is None:
            raise JobNotFound(f"no job {job_id[:80]!r}", param="job_id")
        refuse_purged(row)
        return dict(row.body)

    async def purge(self, job_id: str, tenant: str) -> None:
        """Forget input and output; a second time is as good. Raises JobNotFound, Conflict (as
        `retry`).
        """
        row = await self.get(job_id, tenant)
        if not is_over(row):
            raise Conflict(f"the job is {row.status}; cancel it first", code="job_not_done")
        async with self._database.write() as session:
            await refuse_part_of_open(session, row)
            await session.execute(repository.purge(job_id, tenant))
        with suppress(
            RedisError, OSError, TimeoutError
        ):  # while Redis is away: its stream goes by itself in minutes
            async with asyncio.timeout(REDIS_SECONDS):
                await self._redis.delete(events_key(job_id))

    async def original_result(self, row: Row[Any]) -> dict[str, Any] | None:
        """Return the result that a finished replay is compared with."""
        if row.replay_of is None or row.result is None:
            return None
        async with self._database.read() as session:
            found = (
                await session.execute(queries.result_of(row.replay_of, row.tenant))
            ).one_or_none()
        return None if found is None else found.result

    async def cancel(self, job_id: str, tenant: str) -> Row[Any]:
        """Ask for an end; a finished job stays as it is. Raises JobNotFound."""
        await self.get(job_id, tenant)
        async with self._database.write() as session:
            moved = (await session.execute(repository.request_cancel(job_id))).one_or_none()
        if moved is not None:
            try:
                async with asyncio.timeout(REDIS_SECONDS):
                    if moved.status == JobStatus.RUNNING.value:
                        await publish_cancel(self._redis, job_id)
                    else:
                        seconds = self._settings.event_stream_seconds
                        await publish_done(
                            self._redis, job_id, moved.status, stream_seconds=seconds
                        )
            except (RedisError, OSError, TimeoutError) as exc:
                _log.warning(
                    "publish_failed", job_id=job_id, error=type(exc).__name__
                )  # the heartbeat brings it
        return await self.get(job_id, tenant)


def refuse_purged(row: Row[Any]) -> None:
    """Raises Gone."""
    if row.purged_at is not None:
        raise Gone(f"input and output of {row.id} were purged", code="job_purged")


def is_over(row: Row[Any]) -> bool:
    return row.status in TERMINAL


def _hash(submission: Submission) -> str:
    """Return the hash of everything that makes two requests the same."""
    whole = [
        submission.endpoint,
        submission.body,
        submission.priority.value,
        submission.custom_id,
        dict(submission.metadata),
        {k: str(v) for k, v in submission.deadlines.columns().items() if v is not None},
        submission.webhook,
    ]
    return hashlib.sha256(
        json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
