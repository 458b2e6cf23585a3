"""All tables; importing this module fills `Base.metadata`."""

from shared.db.tables.batches import Batch, File, FileChunk
from shared.db.tables.counts import Count, CountDelta
from shared.db.tables.dispatch import Lane, LaneDelta, Queue
from shared.db.tables.evaluations import Evaluation, EvaluationItem, EvaluationRun, EvaluationSample
from shared.db.tables.jobs import Attempt, Job
from shared.db.tables.keys import ApiKey
from shared.db.tables.serving import LeaseClock, MaintenanceCount, Model, Worker, WorkerFailure
from shared.db.tables.usage import Usage, UsageDelta
from shared.db.tables.webhooks import (
    Sender,
    WebhookAttempt,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEvent,
    WebhookSecret,
)

__all__ = [
    "ApiKey",
    "Attempt",
    "Batch",
    "Count",
    "CountDelta",
    "Evaluation",
    "EvaluationItem",
    "EvaluationRun",
    "EvaluationSample",
    "File",
    "FileChunk",
    "Job",
    "Lane",
    "LaneDelta",
    "LeaseClock",
    "MaintenanceCount",
    "Model",
    "Queue",
    "Sender",
    "Usage",
    "UsageDelta",
    "WebhookAttempt",
    "WebhookDelivery",
    "WebhookEndpoint",
    "WebhookEvent",
    "WebhookSecret",
    "Worker",
    "WorkerFailure",
]
