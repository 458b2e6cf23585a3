"""A submitted request, as its submitter holds it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from worker.engine.outputs import RequestOutput
from worker.engine.request import EngineRequest


class RequestHandle:
    """Wait for a request, abort it.

    Attributes:
        future: what the engine ends; to be awaited with `asyncio.wrap_future`.
    """

    def __init__(self, request: EngineRequest, abort: Callable[[str], object]) -> None:
        self.request, self._abort = request, abort
        self.future: Future[RequestOutput] = Future()
        # Nobody but the engine ends it: a cancelled `asyncio.wrap_future` would else cancel it
        # under the engine's hands.
        self.future.set_running_or_notify_cancel()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The output; after an abort it holds what was committed, with finish_reason "abort".

        Raises:
            TimeoutError: not finished within `timeout` seconds.
            VDiffError: what ended the request.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        return self.future.done()

    def add_done_callback(self, fn: Callable[[RequestHandle], object]) -> None:
        """Call `fn(handle)` when finished, from the engine's thread (or at once): it must be quick."""
        self.future.add_done_callback(lambda _: fn(self))

    def abort(self) -> None:
        """Ask the engine to drop the request; its slot is free within one step."""
        self._abort(self.request_id)
