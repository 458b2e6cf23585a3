"""vdiff, the job system for diffusion language models: the front door. Importing it loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdiff import client
    from vdiff.client import AsyncClient, Client, ClientError, verify_webhook
    from vdiff.version import VLLM_COMPAT_VERSION, __version__, __version_info__
    from worker.engine import (
        AsyncVDiffEngine,
        ModelConfig,
        SamplingParams,
        VDiffConfig,
        VDiffEngine,
    )

_HOME = {
    "__version__": "vdiff.version",
    "__version_info__": "vdiff.version",
    "VLLM_COMPAT_VERSION": "vdiff.version",
    "AsyncClient": "vdiff.client",
    "Client": "vdiff.client",
    "ClientError": "vdiff.client",
    "verify_webhook": "vdiff.client",
    "AsyncVDiffEngine": "worker.engine",
    "ModelConfig": "worker.engine",
    "SamplingParams": "worker.engine",
    "VDiffConfig": "worker.engine",
    "VDiffEngine": "worker.engine",
}

__all__ = [
    "VLLM_COMPAT_VERSION",
    "AsyncClient",
    "AsyncVDiffEngine",
    "Client",
    "ClientError",
    "ModelConfig",
    "SamplingParams",
    "VDiffConfig",
    "VDiffEngine",
    "__version__",
    "__version_info__",
    "client",
    "verify_webhook",
]


def __getattr__(name: str) -> Any:
    if name == "client":
        return import_module("vdiff.client")
    if name not in _HOME:
        raise AttributeError(f"module 'vdiff' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
