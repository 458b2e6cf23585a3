"""The Python client: `Client` and `AsyncClient`, for the native job API. It needs httpx, and
neither torch nor a database.

sync_client.py, async_client.py   how requests are sent        calls.py    what is sent, once for
both retry.py                          whether one is sent again    mapping.py  the bookkeeping of
`map` types.py, errors.py               what comes back              sse.py      events from bytes
connection.py                     address, key, headers; verify_webhook evaluations.py
evaluations: calls, types and the methods of both clients

docs/client.md has an example of each method; tests run them.
"""

from vdiff.client.async_client import AsyncClient
from vdiff.client.calls import batch_lines
from vdiff.client.connection import verify_webhook
from vdiff.client.errors import (
    ApiError,
    AuthenticationFailed,
    BadRequest,
    ClientError,
    Conflict,
    Gone,
    InvalidWebhook,
    JobFailed,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    ServerUnreachable,
    UnexpectedAnswer,
    WaitTimeout,
)
from vdiff.client.evaluations import Evaluation, EvaluationItem
from vdiff.client.sync_client import Client
from vdiff.client.types import Batch, BatchItem, Event, File, Job, Model, Outcome

__all__ = [
    "ApiError",
    "AsyncClient",
    "AuthenticationFailed",
    "BadRequest",
    "Batch",
    "BatchItem",
    "Client",
    "ClientError",
    "Conflict",
    "Evaluation",
    "EvaluationItem",
    "Event",
    "File",
    "Gone",
    "InvalidWebhook",
    "Job",
    "JobFailed",
    "Model",
    "NotFound",
    "Outcome",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "ServerUnreachable",
    "UnexpectedAnswer",
    "WaitTimeout",
    "batch_lines",
    "verify_webhook",
]
