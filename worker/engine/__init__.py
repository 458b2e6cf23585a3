"""The engine: continuous batching of diffusion language models. Knows tensors, not queues: no
Celery, Redis or SQL.

    from worker.engine import VDiffConfig, VDiffEngine
    with VDiffEngine(VDiffConfig(model="vdiff/bundled/vdiff-tiny")) as engine:
        print(engine.generate({"messages": [{"role": "user", "content": "What is 17 +
        25?"}]}).outputs[0].text)

Read `engine.py` first (the loop), then `step.py` (one step), `passes.py` and `batch.py` (the
forward), `sampler.py` (what is made of it), `scheduler.py` (who joins), `rules/` (what is
committed).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.engine.apd import APDConfig, APDDecoder
    from worker.engine.async_engine import AsyncVDiffEngine
    from worker.engine.config import ModelConfig, VDiffConfig
    from worker.engine.engine import VDiffEngine
    from worker.engine.handle import RequestHandle
    from worker.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, StepEvent
    from worker.engine.sampler import DiffusionSampler, DiffusionSamplerConfig
    from worker.engine.sampling_params import DiffusionParams, SamplingParams
    from worker.engine.state import EngineState, EngineStats, HealthStatus

_HOME = {
    "APDConfig": "apd",
    "APDDecoder": "apd",
    "AsyncVDiffEngine": "async_engine",
    "ModelConfig": "config",
    "VDiffConfig": "config",
    "RequestHandle": "handle",
    "VDiffEngine": "engine",
    "CompletionOutput": "outputs",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "StepEvent": "outputs",
    "DiffusionSampler": "sampler",
    "DiffusionSamplerConfig": "sampler",
    "DiffusionParams": "sampling_params",
    "SamplingParams": "sampling_params",
    "EngineState": "state",
    "EngineStats": "state",
    "HealthStatus": "state",
}

__all__ = [
    "APDConfig",
    "APDDecoder",
    "AsyncVDiffEngine",
    "CompletionOutput",
    "DiffusionParams",
    "DiffusionSampler",
    "DiffusionSamplerConfig",
    "EngineState",
    "EngineStats",
    "HealthStatus",
    "ModelConfig",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StepEvent",
    "VDiffConfig",
    "VDiffEngine",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that the configuration and the parameters can be imported without torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
