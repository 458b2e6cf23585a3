"""The life of one attempt: claim the row, run it in the engine, record the end. One call per
message, in a pool thread.

Only the row decides. A message whose row cannot be claimed (a duplicate, or cancelled) is done at
once; an end whose fence does not match any more (the lease ran out, or the worker drained) is
dropped and logged. While PostgreSQL is away the claim and the end are tried again until PostgreSQL
answers. An end whose values PostgreSQL refuses fails the job at once with `result_not_stored`:
another attempt would compute the same values.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import redis
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Row, Select
from sqlalchemy.exc import SQLAlchemyError, StatementError

from shared import tracing
from shared.canvas import CanvasWriter
from shared.db.retries import persist
from shared.db.session import Database, WriteSession, is_refusal
from shared.diffusion_params import shown_diffusion
from shared.errors import EngineError, EngineStopped, VDiffError
from shared.events import Event
from shared.jobs import lanes, repository, suspects
from shared.jobs.status import TERMINAL, JobStatus, Priority
from shared.jobs.steps import StepLog
from shared.metrics import (
    ATTEMPTS,
    QUEUE_SECONDS,
    RUN_SECONDS,
    TOKENS_COMMITTED,
    TOKENS_PER_FORWARD,
)
from shared.queue.repush import push_again
from shared.sampling_params import SamplingParams
from shared.strict_json import NotStorable, require_storable, storable
from worker import traces
from worker.engine.outputs import RequestMetrics, RequestOutput, StepEvent
from worker.gate import Gate
from worker.held import Held, HeldAttempts, StopReason
from worker.work import (
    Engine,
    Handle,
    answers_of,
    check_answers,
    result_of,
    submit,
    usage_of,
    writes_text,
)

_log = structlog.get_logger(__name__)

GATE_SECONDS = 2.0  # how long a job waits here for suspects to end, before it may go elsewhere
TOKEN_TEXTS = 65_536  # texts of single tokens that are kept
PRIORITY_RANKS = {"interactive": 0, "normal": 1, "bulk": 2}


FOREIGN = (StopReason.LOST, StopReason.DRAINED)  # the attempt is not this worker's any more


class Counters:
    """Counts of this worker since it started; part of its statistics."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(
            (
                "jobs_succeeded",
                "jobs_failed",
                "jobs_cancelled",
                "jobs_expired",
                "jobs_requeued",
                "ends_fenced",
                "tokens_generated",
                "prompt_tokens",
                "job_forwards",
                "job_ms",
            ),
            0,
        )

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)


class Runner:
    def __init__(
        self,
        database: Database,
        client: redis.Redis,
        engine: Engine,
        held: HeldAttempts,
        emit: Callable[[Event], None],
        *,
        worker_id: str,
        lease_seconds: float,
        counters: Counters,
        accepts: Callable[[], bool] = lambda: True,
        given_up: Callable[[], bool] = lambda: False,
        revision: str | None = None,
        model: str | None = None,
        token_text: Callable[[int], str] = str,
        keep_steps_tokens: int = 0,
    ) -> None:
        self._database = database
        self._redis = client
        self._engine = engine
        self._held = held
        self._emit = emit
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._counters = counters
        self._accepts = accepts
        self._revision = revision
        self._model = model
        self._token_text = lru_cache(TOKEN_TEXTS)(lambda token: str(storable(token_text(token))))
        self._keep_steps_tokens = keep_steps_tokens
        self._given_up = given_up
        self.gate = Gate()
        self.on_claim: Callable[[], None] = lambda: None

    def run_job(self, job_id: str) -> None:
        """Claim and run one job; returns when its attempt is over, however it ended."""
        if not self._accepts():
            return  # shutting down: the row stays queued and is pushed again
        if not self.gate.enter(GATE_SECONDS):
            self.put_back(job_id)  # suspects run here now; another worker may be free
            return
        try:
            if not self._accepts():
                self.put_back(
                    job_id
                )  # the worker began to shut down while this job waited at the gate
                return
            began = time.time()
            job = self.claim(job_id, give_up=lambda: not self._accepts())
            if job is not None:
                self.on_claim()
                self.run_claimed(job, began=began)
        finally:
            self.gate.leave()

    def claim(
        self, job_id: str, *, give_up: Callable[[], bool], apart: bool = False, alone: bool = False
    ) -> Row[Any] | None:
        """Claim a job; None when there is nothing to claim. While PostgreSQL is away, try until
        `give_up` says so.
        """
        statement = repository.claim(
            job_id,
            worker_id=self._worker_id,
            lease_seconds=self._lease_seconds,
            revision=self._revision,
            model=self._model,
            apart=apart,
            alone=alone,
        )

        def take(session: WriteSession, again: bool) -> Row[Any] | None:
            job = session.execute(statement).one_or_none()
            if job is None and again and self._held.get(job_id) is None:
                # The COMMIT before may have happened although its answer was lost.
                job = session.execute(suspects.claimed_by(job_id, self._worker_id)).one_or_none()
            return job

        try:
            job = persist(self._database, take, give_up=give_up)
        except (SQLAlchemyError, OSError) as exc:
            _log.warning("claim_failed", job_id=job_id, error=type(exc).__name__)
            return None
        if job is None:
            _log.debug("nothing_to_claim", job_id=job_id)
        return job

    def run_claimed(self, job: Row[Any], *, began: float) -> None:
        """Run the attempt that `claim` returned.

        Args:
            began: Unix time when claiming it began.
        """
        held = self._held.add(job.id, job.attempt, Priority(job.priority))
        try:
            with traces.attempt(job, began=began, worker_id=self._worker_id):
                self._run(job, held)
        finally:
            self._held.remove(held)

    def put_back(self, job_id: str) -> None:
        """Its message was not for this program: the row waits for another one, which a dispatcher
        will push.
        """
        try:
            with self._database.write() as session:
                session.execute(lanes.untake([job_id]))
        except SQLAlchemyError as exc:
            _log.warning(
                "not_put_back", job_id=job_id, error=type(exc).__name__
            )  # the sweeper misses its message

    def give_back(self, jobs: Sequence[Row[Any]]) -> None:
        """Return claimed jobs whose attempts did not start to the queue. No failure is counted."""
        statement = repository.drain([(job.id, job.attempt) for job in jobs])
        try:
            moved = persist(
                self._database,
                lambda session, again: session.execute(statement).all(),
                give_up=lambda: not self._accepts(),
            )
            push_again(self._database, self._redis, moved)
        except (RedisError, OSError, SQLAlchemyError) as exc:
            # The sweeper takes the jobs when their leases run out.
            _log.warning("not_given_back", jobs=[job.id for job in jobs], error=type(exc).__name__)

    def _run(self, job: Row[Any], held: Held) -> None:
        log = _log.bind(job_id=job.id, attempt=job.attempt)
        waited = (job.started_at - job.queued_at).total_seconds()
        QUEUE_SECONDS.labels(priority=job.priority).observe(max(waited, 0.0))
        log.info("attempt_started", prompt_tokens=len(job.prompt_token_ids))
        began = time.monotonic()
        self._emit(
            Event(
                job.id,
                "started",
                {"attempt": job.attempt, "worker_id": self._worker_id},
                job.tenant,
            )
        )
        output: RequestOutput | None = None
        error: VDiffError | None = None
        try:
            params = SamplingParams.from_json(job.params)
            handle = submit(
                self._engine,
                job,
                params,
                priority=PRIORITY_RANKS[job.priority],
                listener=self._listener(held, params, answers_of(job, params)),
            )
            held.attach(handle)
            output = self._result_in_time(handle, job, held)
            traces.engine(output.metrics)
            check_answers(params, output)
        except VDiffError as exc:
            error = exc
        except Exception as exc:
            # The edge between engine and jobs: whatever it is, it is this attempt's end and must be
            # recorded as such.
            log.exception("attempt_broke")
            error = EngineError(f"{type(exc).__name__}: {exc}")
        self._record(
            job, held, output, error, elapsed_ms=1000 * (time.monotonic() - began), log=log
        )

    @staticmethod
    def _result_in_time(handle: Handle, job: Row[Any], held: Held) -> RequestOutput:
        """The output, cut off at complete_by or max_run_seconds, whichever comes first. Local
        seconds, no clock.
        """
        bounds = [float(s) for s in (job.seconds_left, job.max_run_seconds) if s is not None]
        if not bounds:
            return handle.result()
        try:
            return handle.result(max(0.0, min(bounds)))
        except TimeoutError:
            late = job.seconds_left is not None and min(bounds) == float(job.seconds_left)
            held.expired = repository.COMPLETE_BY_ERROR if late else repository.MAX_RUN_ERROR
            held.stop(StopReason.EXPIRED)
            return handle.result()

    def _record(
        self,
        job: Row[Any],
        held: Held,
        output: RequestOutput | None,
        error: VDiffError | None,
        *,
        elapsed_ms: float,
        log: Any,
    ) -> None:
        if held.reason in FOREIGN:
            log.info("attempt_dropped", reason=held.reason.value)
            return
        try:
            moved = self._write(
                job, held, self._end(job, held, output, error, elapsed_ms, log), log
            )
        except Exception as exc:
            # The result cannot be built or stored. Left alone, the lease would run out and the
            # worker would be blamed.
            error = _not_stored(exc)
            known = isinstance(exc, NotStorable)
            log.error(
                "end_refused",
                code=error.code,
                error=type(exc).__name__,
                reason=error.message,
                exc_info=not known,
            )
            moved = self._write(job, held, _bare_end(job, held, error), log)
        if moved is None:
            return
        self._after(job, moved, output, error, elapsed_ms, log)

    def _end(
        self,
        job: Row[Any],
        held: Held,
        output: RequestOutput | None,
        error: VDiffError | None,
        elapsed_ms: float,
        log: Any,
    ) -> Select[Any]:
        """Return the statement that ends the attempt. Raises NotStorable, and whatever building a
        result raises.
        """
        if held.reason in (StopReason.CANCELLED, StopReason.EXPIRED):
            cancelled = held.reason is StopReason.CANCELLED
            return repository.finish(
                job.id,
                job.attempt,
                JobStatus.CANCELLED if cancelled else JobStatus.EXPIRED,
                error=repository.CANCELLED_ERROR if cancelled else held.expired,
                **({} if output is None else report(job, output, elapsed_ms)),
                progress=held.progress,
                steps=self._kept(held),
            )
        if error is not None:
            log.warning(
                "attempt_failed",
                code=error.code,
                error=type(error).__name__,
                retryable=error.retryable,
            )
            if isinstance(error, EngineStopped):
                # The engine took all jobs with it. That is a loss, not a failure of this one.
                return repository.lose_attempt(
                    job.id, job.attempt, group_size=max(1, held.neighbours), error=_described(error)
                )
            if error.retryable:
                return repository.fail_attempt(job.id, job.attempt, error=_described(error))
            return repository.finish(job.id, job.attempt, JobStatus.FAILED, error=_described(error))
        assert output is not None
        numbers = report(job, output, elapsed_ms)
        result = storable(result_of(job, output, numbers, self._engine))
        require_storable(result, most_bytes=repository.RESULT_BYTES_MAX)
        return repository.finish(
            job.id,
            job.attempt,
            JobStatus.SUCCEEDED,
            result=result,
            usage=usage_of(result),
            timing=numbers["timing"],
            diffusion=numbers["diffusion"],
            progress=held.progress,
            steps=self._kept(held),
        )

    def _after(
        self,
        job: Row[Any],
        moved: Row[Any],
        output: RequestOutput | None,
        error: VDiffError | None,
        elapsed_ms: float,
        log: Any,
    ) -> None:
        """Count an end that is committed, announce it, and push the job again where it went back to
        the queue.
        """
        tracing.note(outcome=moved.status, error=None if error is None else error.code)
        self._count(moved.status, output, elapsed_ms)
        algorithm = job.params["diffusion"]["algorithm"]
        RUN_SECONDS.labels(algorithm=algorithm).observe(elapsed_ms / 1000)
        if output is not None and moved.status == JobStatus.SUCCEEDED and writes_text(job):
            TOKENS_PER_FORWARD.labels(algorithm=algorithm).observe(
                output.metrics.tokens_per_forward
            )
        log.info("attempt_ended", now=moved.status, elapsed_ms=round(elapsed_ms, 1))
        if JobStatus(moved.status) in TERMINAL:
            self._emit(Event(job.id, "done", {"status": moved.status}))
            return
        try:
            push_again(self._database, self._redis, [moved])
        except (RedisError, OSError, SQLAlchemyError) as exc:
            log.warning("push_failed", error=type(exc).__name__)  # the sweeper does it

    def _write(
        self, job: Row[Any], held: Held, statement: Select[Any], log: Any
    ) -> Row[Any] | None:
        """Execute a fenced move. Return None when the attempt is not ours any more, or the worker
        shuts down.

        While PostgreSQL is away the move is tried again: nobody else can take the job meanwhile.
        Its thread runs nothing else, so a worker keeps at most as many results as it runs jobs.

        Raises:
            NotStorable: PostgreSQL or its driver refuses the values.
        """

        def end(session: WriteSession, again: bool) -> Row[Any] | None:
            with tracing.span("vdiff.record"):
                row = session.execute(statement).one_or_none()
                if row is None and again:
                    # The COMMIT before may have happened although its answer was lost.
                    row = session.execute(suspects.ended_attempt(job.id, job.attempt)).one_or_none()
            return row

        held.ending = True
        try:
            row = persist(
                self._database, end, give_up=lambda: self._given_up() or held.reason in FOREIGN
            )
        except (SQLAlchemyError, OSError, TypeError, ValueError) as exc:
            if is_refusal(exc):
                raise NotStorable(f"PostgreSQL refuses it: {_reason(exc)}") from exc
            # The lease runs out and the sweeper gives the job to another worker.
            log.error("end_not_recorded", error=type(exc).__name__)
            return None
        if row is None:
            self._counters.add(ends_fenced=1)
            log.warning("end_fenced")
        return row

    def _kept(self, held: Held) -> bytes | None:
        return None if held.steps is None else held.steps.packed(self._token_text)

    def _shown(self, provisional: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens that a step proposes and has not committed, with their texts, named as the
        committed ones are.
        """
        ids = list(provisional["token_ids"])
        return {
            "positions": list(provisional["positions"]),
            "tokens": ids,
            "texts": [self._token_text(token) for token in ids],
        }

    def _listener(
        self, held: Held, params: SamplingParams, answers: int
    ) -> Callable[[StepEvent], None]:
        """Runs in the engine's thread, once per step and answer: it only notes and passes on."""
        job_id, attempt = held.pair
        committed: dict[int, int] = {}
        total: dict[int, int] = {}
        characters: dict[int, int] = {}
        canvases: dict[int, CanvasWriter] = {}
        log = held.steps = StepLog(attempt, self._keep_steps_tokens)

        def listen(event: StepEvent) -> None:
            TOKENS_COMMITTED.inc(len(event.positions))
            committed[event.index] = event.tokens_committed
            total[event.index] = event.tokens_total
            held.progress = {
                "tokens_committed": sum(committed.values()),
                # Answers that have not begun will be as long as they may.
                "tokens_total": sum(total.values()) + params.max_tokens * (answers - len(total)),
                "step": event.step,
            }
            common = {"attempt": attempt, "index": event.index, "step": event.step}
            offset = characters.get(event.index, 0)
            characters[event.index] = offset + len(event.text_delta)
            progress = {
                **common,
                "tokens_committed": event.tokens_committed,
                "tokens_total": event.tokens_total,
                "offset": offset,
                "text": storable(
                    event.text_delta
                ),  # as the result will have it: a stream must not differ from it
            }
            if event.canvas is not None:
                canvas = canvases.setdefault(event.index, CanvasWriter())
                progress.update(canvas.fields(str(storable(event.canvas))))
            self._emit(Event(job_id, "progress", progress))
            if not event.positions and event.provisional is None:
                return  # a score, which denoises nothing
            log.note(
                event.index,
                event.step,
                event.positions,
                event.token_ids,
                event.confidences,
                event.tokens_total,
            )
            self._emit(
                Event(
                    job_id,
                    "denoise",
                    {
                        **common,
                        "positions": list(event.positions),
                        "tokens": list(event.token_ids),
                        "texts": [self._token_text(token) for token in event.token_ids],
                        "confidence": [round(c, 5) for c in event.confidences],
                        **(
                            {}
                            if event.provisional is None
                            else {"provisional": self._shown(event.provisional)}
                        ),
                    },
                )
            )

        return listen

    def _count(self, status: str, output: RequestOutput | None, elapsed_ms: float) -> None:
        name = {
            "succeeded": "jobs_succeeded",
            "failed": "jobs_failed",
            "cancelled": "jobs_cancelled",
            "expired": "jobs_expired",
        }
        self._counters.add(**{name.get(status, "jobs_requeued"): 1})
        ATTEMPTS.labels(outcome=status if status in name else "requeued").inc()
        if status == JobStatus.SUCCEEDED:
            self._counters.add(job_ms=round(elapsed_ms))
        if output is not None:
            self._counters.add(
                tokens_generated=output.metrics.generated_tokens,
                prompt_tokens=output.metrics.prompt_tokens,
                job_forwards=output.metrics.forwards,
            )


def _reason(exc: Exception) -> str:
    """Return the first line of the server's or the driver's message, without the statement and its
    values.
    """
    told = str(exc.orig if isinstance(exc, StatementError) else exc).strip().splitlines()
    return told[0][:200] if told else type(exc).__name__


def _described(error: VDiffError) -> dict[str, Any]:
    """Return the error as a job's row holds it."""
    told = {
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "retryable": error.retryable,
    }
    cleaned: dict[str, Any] = storable(told)
    return cleaned


def _bare_end(job: Row[Any], held: Held, error: VDiffError) -> Select[Any]:
    """Return the statement that ends an attempt with nothing that the model or the engine wrote."""
    if held.reason is StopReason.CANCELLED:
        return repository.finish(
            job.id, job.attempt, JobStatus.CANCELLED, error=repository.CANCELLED_ERROR
        )
    if held.reason is StopReason.EXPIRED:
        return repository.finish(job.id, job.attempt, JobStatus.EXPIRED, error=held.expired)
    return repository.finish(job.id, job.attempt, JobStatus.FAILED, error=_described(error))


def _not_stored(exc: Exception) -> VDiffError:
    told = repository.RESULT_NOT_STORED_ERROR
    reason = (
        str(exc) if isinstance(exc, NotStorable) else f"building it raised {type(exc).__name__}"
    )
    return VDiffError(f"{told['message']}: {reason}"[:500], code=str(told["code"]))


def report(job: Row[Any], output: RequestOutput, elapsed_ms: float) -> dict[str, Any]:
    """`usage`, `timing` and `diffusion` of an attempt that ran; queueing by the database's clock,
    the rest by ours.
    """
    metrics = output.metrics
    queued_ms = 1000 * (job.started_at - job.queued_at).total_seconds()
    before_ms = 1000 * (job.started_at - job.created_at).total_seconds()
    return {
        "usage": {
            "prompt_tokens": metrics.prompt_tokens,
            "completion_tokens": metrics.generated_tokens,
            "total_tokens": metrics.prompt_tokens + metrics.generated_tokens,
        },
        "timing": {
            "queued_ms": round(queued_ms, 3),
            "admitted_ms": round(metrics.queued_ms, 3),  # accepted by the engine to its first step
            "prompt_ms": round(metrics.prompt_ms, 3),
            "denoise_ms": round(metrics.denoise_ms, 3),
            "device_ms": round(1000 * metrics.device_seconds, 3),
            "total_ms": round(before_ms + elapsed_ms, 3),
        },
        "diffusion": {
            **shown_diffusion(job.params),
            "forwards": metrics.forwards,
            "tokens_per_forward": round(metrics.tokens_per_forward, 4),
            "seed": output.seed,
            **_more(metrics),
        },
    }


def _more(metrics: RequestMetrics) -> dict[str, Any]:
    """Return the fields that only some ways of decoding report."""
    made: dict[str, Any] = {}
    if metrics.acceptance_rate is not None:
        made["acceptance_rate"] = round(metrics.acceptance_rate, 4)
        made["verifier_ms"] = round(1000 * metrics.verifier_seconds, 3)
    if metrics.cache_refreshes:
        made["cache_refreshes"] = metrics.cache_refreshes
    if metrics.prefill_forwards:
        made["prefill_forwards"] = metrics.prefill_forwards
    return made
