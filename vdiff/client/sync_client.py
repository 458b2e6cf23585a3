"""`vdiff.Client`: blocking. No event loop is involved, so it works inside a notebook's too, and in
any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import IO, Any, TypeVar, Unpack

import httpx

from shared.canvas import CanvasReader
from vdiff.client import calls
from vdiff.client.calls import CHAT, INFILL, LOGLIKELIHOOD, REST_SECONDS, WAIT_SECONDS, Call, Page
from vdiff.client.connection import (
    MAP_RETRY_SECONDS,
    RETRY_SECONDS,
    STREAM_SILENCE_SECONDS,
    Connection,
    read_answer,
    request_options,
    require_stream,
    verify_webhook,
)
from vdiff.client.errors import BadRequest, ClientError, WaitTimeout
from vdiff.client.evaluations import SyncEvaluations
from vdiff.client.mapping import Ledger, Progress
from vdiff.client.retry import Attempts, OnWait
from vdiff.client.sse import EventParser
from vdiff.client.types import (
    Batch,
    BatchItem,
    Event,
    File,
    Job,
    JobOptions,
    Model,
    Outcome,
    Prompt,
    Wire,
)

T = TypeVar("T")
W = TypeVar("W", bound=Wire)


class Client(SyncEvaluations):
    """A vdiff server, as Python sees it.

        with vdiff.Client() as client:
            print(client.run("What is 17 + 25?").text)

    Args:
        base_url: default VDIFF_BASE_URL, else a `vdiff up` that runs in this folder, else
            http://127.0.0.1:8000.
        api_key: default VDIFF_API_KEY.
        model: for calls that name none; default: the server's model, if it has only one.
        retry_seconds: how long a call goes on when the server does not answer, is overloaded or
            says 429.
        on_wait: told before each such wait: seconds, and why; in whichever thread waits.
        transport: of httpx, for tests.

    Every method raises the kinds of `ClientError`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        on_wait: OnWait | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._at = Connection(base_url, api_key, model, retry_seconds)
        self._http = httpx.Client(**self._at.http_options(), transport=transport)
        self._wait = WAIT_SECONDS
        self._on_wait = on_wait
        self._naming = threading.Lock()

    @property
    def base_url(self) -> str:
        return self._at.url

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Sending

    def _attempts(self, *, repeatable: bool, seconds: float | None = None) -> Attempts:
        seconds = self._at.retry_seconds if seconds is None else seconds
        return Attempts(
            repeatable=repeatable, seconds=seconds, now=monotonic, on_wait=self._on_wait
        )

    def _do(self, call: Call[T], *, retry_seconds: float | None = None) -> T:
        attempts = self._attempts(repeatable=call.repeatable, seconds=retry_seconds)
        while True:
            try:
                response = self._http.request(call.method, call.path, **request_options(call))
            except httpx.RequestError as exc:
                wait: float | None = attempts.after_failure(exc, self._at.url)
            else:
                wait = attempts.after_answer(response)
                if wait is None:
                    return read_answer(call.read, response, text=call.text)
            sleep(wait or 0.0)

    def _every(self, call: Call[Page[W]], limit: int | None) -> Iterator[W]:
        following: Call[Page[W]] | None = call
        while following is not None:
            page = self._do(following)
            for one in page.items:
                if limit is not None:
                    if limit <= 0:
                        return
                    limit -= 1
                call_whole = None if page.whole is None else page.whole(one)
                yield one if call_whole is None else self._do(call_whole)
            following = page.next

    def _job_body(
        self, prompt: Prompt, options: Mapping[str, Any], retry_seconds: float | None = None
    ) -> dict[str, Any]:
        if self._at.model is None and not calls.names_model(prompt, options):
            with self._naming:  # one asks, for all threads of a `map`
                if self._at.model is None:
                    models = self._do(calls.models(), retry_seconds=retry_seconds)
                    self._at.model = calls.only_model(models)
        return calls.job_body(prompt, options, self._at.model)

    # Jobs

    def submit(
        self, prompt: Prompt, *, idempotency_key: str | None = None, **options: Unpack[JobOptions]
    ) -> Job:
        """Queue a job and return at once."""
        body = self._job_body(prompt, options)
        return self._do(calls.submit(body, idempotency_key or calls.new_key()))

    def run(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Submit, wait, and return the job that succeeded. Raises JobFailed, WaitTimeout too."""
        job = self.submit(prompt, idempotency_key=idempotency_key, **options)
        return self.wait(job, timeout=timeout).require()

    def get(self, job: Job | str) -> Job:
        """The job now."""
        return self._do(calls.get(job))

    def wait(self, job: Job | str, *, timeout: float | None = None) -> Job:
        """The job once it is over, however it ended. Raises WaitTimeout: it is not over after
        `timeout` seconds.
        """
        return self._wait_for(job, timeout, None)

    def _wait_for(self, job: Job | str, timeout: float | None, retry_seconds: float | None) -> Job:
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            asked_at = monotonic()
            wait = (
                self._wait if deadline is None else max(0.0, min(self._wait, deadline - asked_at))
            )
            try:
                found = self._do(calls.get(job, wait), retry_seconds=retry_seconds)
            except BadRequest as exc:
                self._wait = calls.less_wait(exc, wait)
                continue
            if found.done:
                return found
            now = monotonic()
            if deadline is not None and now >= deadline:
                raise WaitTimeout(f"{found.id} is {found.status} after {timeout:g} s; it goes on")
            if now - asked_at < REST_SECONDS:
                sleep(REST_SECONDS)

    def stream(self, job: Job | str) -> Iterator[Event]:
        """The job's events from its beginning to `done`; goes on where it was after a lost
        connection.
        """
        path, last = f"/v1/jobs/{calls.id_of(job)}/events", ""
        canvases: dict[int, CanvasReader] = {}
        attempts = self._attempts(repeatable=True)
        while True:
            wait: float | None = 0.0
            try:
                headers = {
                    "Accept": "text/event-stream",
                    **({"Last-Event-ID": last} if last else {}),
                }
                timeout = httpx.Timeout(STREAM_SILENCE_SECONDS)
                with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
                    if response.status_code >= 300:
                        response.read()
                        wait = attempts.after_answer(response)
                    else:
                        require_stream(response)
                        parser = EventParser(canvases)
                        for piece in response.iter_bytes():
                            for event in parser.feed(piece):
                                attempts = self._attempts(repeatable=True)
                                last = event.id or last
                                yield event
                                if event.type == "done":
                                    return
                        wait = REST_SECONDS  # the server stops, or its ten minutes are over
            except httpx.RequestError as exc:
                wait = attempts.after_failure(exc, self._at.url)
            sleep(wait or 0.0)

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 32,
        progress: Progress = True,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> list[Outcome]:
        """Run many prompts, `concurrency` at a time, and return what became of each, in their
        order.

        A prompt that fails has its error in its `Outcome` and the rest goes on; a server that goes
        away for up to ten minutes is waited for. With `idempotency_key`, the same call again within
        24 hours (also after this program was killed) takes over the jobs of the first instead of
        paying for them twice. Ctrl-C leaves what was submitted running.
        """
        ledger = Ledger(prompts, idempotency_key=idempotency_key, progress=progress)
        broken: list[BaseException] = []

        def work() -> None:
            try:
                while (found := ledger.next()) is not None:
                    index, prompt, key = found
                    ledger.took(index, prompt, *self._one(prompt, key, options))
            except (
                BaseException
            ) as exc:  # the source of prompts, or whoever is told of progress: theirs to see
                broken.append(exc)
                ledger.stopped = True

        threads = [
            threading.Thread(target=work, name=f"vdiff-map-{i}", daemon=True)
            for i in range(ledger.useful(concurrency))
        ]
        with ledger.bar:
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                ledger.stopped = True  # on Ctrl-C nothing more is submitted; who waits is a daemon
        if broken:
            raise broken[0]
        return ledger.ordered()

    def _one(
        self, prompt: Prompt, key: str, options: Mapping[str, Any]
    ) -> tuple[Job | None, ClientError | None]:
        try:
            body = self._job_body(prompt, options, MAP_RETRY_SECONDS)
            job = self._do(
                calls.submit(body, key, wait=self._wait), retry_seconds=MAP_RETRY_SECONDS
            )
            if not job.done:
                job = self._wait_for(job, None, MAP_RETRY_SECONDS)
        except ClientError as exc:
            return None, exc
        return (job, None) if job.ok else (job, calls.failure(job))

    def cancel(self, job: Job | str) -> Job:
        """Ask for its end; it stops between two denoising steps. A finished job stays as it is."""
        return self._do(calls.action(job, "cancel", calls.new_key()))

    def retry(self, job: Job | str, *, deadlines: Mapping[str, Any] | None = None) -> Job:
        """Another life for a job that failed, expired or was cancelled; same id."""
        body = None if deadlines is None else {"deadlines": dict(deadlines)}
        return self._do(calls.action(job, "retry", calls.new_key(), body))

    def replay(self, job: Job | str) -> Job:
        """A new job that asks for exactly the same; when it is over its `replay` says whether the
        text is the same.
        """
        return self._do(calls.action(job, "replay", calls.new_key()))

    def purge(self, job: Job | str) -> None:
        """Forget input and output; from then on the job is `Gone`."""
        self._do(calls.purge(job))

    def attempts(self, job: Job | str) -> list[dict[str, Any]]:
        """Every execution of it, oldest first."""
        return self._do(calls.attempts(job))

    def estimate(self, prompt: Prompt, **options: Unpack[JobOptions]) -> dict[str, Any]:
        """Estimate what the job would take; checks everything, accepts nothing."""
        return self._do(calls.estimate(self._job_body(prompt, options)))

    def list_jobs(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        batch_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        created_after: float | str | None = None,
        limit: int | None = None,
        results: bool = False,
    ) -> Iterator[Job]:
        """Newest first, page by page as you take them. Lists carry no results: `results=True` asks
        for each of them.
        """
        filters = {
            "status": status,
            "model": model,
            "batch_id": batch_id,
            "metadata": metadata,
            "created_after": created_after,
        }
        return self._every(calls.jobs(filters, results), limit)

    # Files and batches

    def upload(
        self,
        file: Path | str | bytes | IO[bytes],
        *,
        purpose: str = "batch",
        name: str | None = None,
    ) -> File:
        """Upload a path, bytes or an open binary file (from where it is). It streams."""
        attempts = self._attempts(repeatable=False)
        with calls.opened(file) as (source, guess):
            begin = source.tell()
            while True:
                source.seek(begin)
                try:
                    response = self._http.post(
                        "/v1/files",
                        data={"purpose": purpose},
                        files={"file": (name or guess, source)},
                    )
                except httpx.RequestError as exc:
                    wait: float | None = attempts.after_failure(exc, self._at.url)
                else:
                    wait = attempts.after_answer(response)
                    if wait is None:
                        return read_answer(File.of, response)
                sleep(wait or 0.0)

    def get_file(self, file: File | str) -> File:
        return self._do(calls.file(file))

    def list_files(self, *, purpose: str | None = None, limit: int | None = None) -> Iterator[File]:
        return self._every(calls.files(purpose), limit)

    def download(self, file: File | str) -> Iterator[bytes]:
        """The content, in pieces as they come."""
        path, begun = f"/v1/files/{calls.id_of(file)}/content", False
        attempts = self._attempts(repeatable=True)
        while True:
            try:
                with self._http.stream("GET", path) as response:
                    if response.status_code < 300:
                        for piece in response.iter_bytes():
                            begun = True
                            yield piece
                        return
                    response.read()
                    wait = attempts.after_answer(response)
            except httpx.RequestError as exc:
                if begun:
                    raise calls.cut_off(path, exc) from exc
                wait = attempts.after_failure(exc, self._at.url)
            sleep(wait or 0.0)

    def delete_file(self, file: File | str) -> None:
        self._do(calls.delete_file(file))

    def create_batch(
        self,
        file: File | str,
        *,
        endpoint: str = CHAT,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Run an uploaded file of requests."""
        return self._do(
            calls.create_batch(
                file,
                endpoint=endpoint,
                completion_window=completion_window,
                metadata=metadata,
                key=idempotency_key or calls.new_key(),
            )
        )

    def get_batch(self, batch: Batch | str) -> Batch:
        return self._do(calls.batch(batch))

    def wait_batch(
        self,
        batch: Batch | str,
        *,
        timeout: float | None = None,
        poll_seconds: float = 2.0,
        progress: Progress = False,
    ) -> Batch:
        """The batch once it is over, however it ended. Raises WaitTimeout."""
        deadline = None if timeout is None else monotonic() + timeout
        with contextlib.ExitStack() as stack:
            told = calls.batch_progress(progress, stack)
            while True:
                found = self.get_batch(batch)
                told(found)
                if found.done:
                    return found
                if deadline is not None and monotonic() >= deadline:
                    raise WaitTimeout(
                        f"{found.id} is {found.status} after {timeout:g} s; it goes on"
                    )
                sleep(poll_seconds)

    def cancel_batch(self, batch: Batch | str) -> Batch:
        return self._do(calls.batch_action(batch, "cancel"))

    def retry_failed(self, batch: Batch | str) -> Batch:
        """Run again every line that has no result."""
        return self._do(calls.batch_action(batch, "retry_failed"))

    def batch_items(
        self,
        batch: Batch | str,
        *,
        status: str | None = None,
        limit: int | None = None,
        results: bool = True,
    ) -> Iterator[BatchItem]:
        """Its lines in order, also while it runs; what has ended has a `response` or an `error`.

        Args:
            results: False leaves responses out, which saves a request for each line. Once the batch
                is over, its output file has all of them at once.
        """
        return self._every(calls.batch_items(batch, status, results), limit)

    def batch_results(self, batch: Batch | str) -> dict[str, BatchItem]:
        """The lines that are over, by custom_id."""
        return {item.custom_id: item for item in self.batch_items(batch) if item.done}

    def list_batches(self, *, limit: int | None = None) -> Iterator[Batch]:
        return self._every(calls.batches(), limit)

    # Holes and scores

    def infill(
        self, parts: Sequence[str | Mapping[str, int]], **options: Unpack[JobOptions]
    ) -> Job:
        """Fill the holes of a text: parts are text or {"hole": tokens}. The job's `text` is the
        whole text.
        """
        options["endpoint"] = INFILL
        return self.run({"parts": list(parts)}, **options)

    def loglikelihood(
        self,
        context: str | Sequence[int],
        continuation: str | Sequence[int],
        **options: Unpack[JobOptions],
    ) -> dict[str, Any]:
        """Score a continuation: loglikelihood, standard_error, tokens, is_greedy, token_logprobs.
        Fields of the endpoint's own, as mc_num, go into `extra_body`.
        """
        pair = {"context": context, "continuation": continuation}
        options["endpoint"] = LOGLIKELIHOOD
        job = self.run(pair, **options)
        return calls.score(job)

    # The rest

    def models(self) -> list[Model]:
        return self._do(calls.models())

    def server_version(self) -> str:
        return self._do(calls.server_version())

    def webhook_secret(self) -> str:
        """Return the secret that signs the webhooks that single jobs name."""
        return self._do(calls.webhook_secret())

    def verify_webhook(
        self, body: bytes | str, headers: Mapping[str, str], secret: str | None = None
    ) -> dict[str, Any]:
        """The event, checked; without `secret`, with the one of `webhook_secret()`. Raises
        InvalidWebhook.
        """
        return verify_webhook(body, headers, secret or self.webhook_secret())
