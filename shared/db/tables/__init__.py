"""All tables; importing this module fills `Base.metadata`."""

from shared.db.tables.jobs import Attempt, Job
from shared.db.tables.serving import Model, Worker

__all__ = ["Attempt", "Job", "Model", "Worker"]
