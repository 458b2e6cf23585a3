"""AsyncVDiffEngine: the same engine for asyncio code. The step loop stays in its own thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from shared.ids import new_id
from shared.sampling_params import SamplingParams
from worker.engine.config import VDiffConfig
from worker.engine.engine import VDiffEngine
from worker.engine.inputs import Prompt
from worker.engine.outputs import RequestOutput, StepEvent
from worker.engine.state import HealthStatus


class AsyncVDiffEngine:
    """Use as an async context manager; loading happens in a thread."""

    def __init__(self, engine: VDiffEngine) -> None:
        self.engine = engine

    @classmethod
    async def from_config(cls, config: VDiffConfig) -> AsyncVDiffEngine:
        return cls(await asyncio.to_thread(VDiffEngine, config))

    async def __aenter__(self) -> AsyncVDiffEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Any:
        """One prompt in, one RequestOutput out; a list in, a list out."""
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            return await self.engine.generate_async(prompt, params)
        return list(await asyncio.gather(*(self.engine.generate_async(p, params) for p in prompt)))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[StepEvent | RequestOutput]:
        """Every step's event, then the output. Leaving the iterator early aborts the request."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[StepEvent | None] = asyncio.Queue()
        text, ids = self.engine.tokenize(prompt)
        handle = self.engine.submit(
            new_id("req"),
            ids,
            params or SamplingParams(),
            prompt=text,
            listener=lambda event: loop.call_soon_threadsafe(queue.put_nowait, event),
        )
        handle.add_done_callback(lambda _: loop.call_soon_threadsafe(queue.put_nowait, None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            yield handle.result(0)
        finally:
            handle.abort()

    def get_health(self) -> HealthStatus:
        return self.engine.get_health()

    def get_stats(self) -> dict[str, Any]:
        return self.engine.get_stats()

    async def shutdown(self) -> None:
        await asyncio.to_thread(self.engine.shutdown)
