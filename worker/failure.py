"""Why a model could not be loaded, told where somebody looks: the log, and a table that doctor and
dashboard read.

A worker that fails here never registers, so without this its reason would be in the log of one
machine alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared import serving
from shared.db.session import Database
from shared.errors import ModelLoadError, VDiffError
from shared.settings import Settings
from vdiff import bundled
from worker.engine import VDiffEngine

_log = structlog.get_logger(__name__)


def model_name(settings: Settings) -> str:
    """The name that the worker would serve, as far as the settings alone tell it."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    if settings.model is None:
        return bundled.DEFAULT_MODEL
    folder = Path(settings.model).expanduser()
    return folder.resolve().name if folder.is_dir() or folder.is_absolute() else settings.model


def load_or_tell(
    load: Callable[[], VDiffEngine], settings: Settings, database_url: str, *, version: str
) -> VDiffEngine:
    """The engine; a failure to load it is logged and recorded before it goes on its way."""
    try:
        return load()
    except VDiffError as exc:
        _tell(settings, database_url, exc.code, exc.message, version)
        raise
    except (
        Exception
    ) as exc:  # torch's own, of a driver or of memory: whatever it is, it must be found
        _tell(settings, database_url, ModelLoadError.code, f"{type(exc).__name__}: {exc}", version)
        raise


def _tell(settings: Settings, database_url: str, code: str, message: str, version: str) -> None:
    name = model_name(settings)
    _log.critical("model_not_loaded", model=name, code=code, reason=message)
    database = Database(database_url, pool_size=1)
    try:
        with database.write() as session:
            session.execute(
                serving.record_failure(
                    hostname=socket.gethostname(),
                    model=name,
                    code=code,
                    message=message,
                    pid=os.getpid(),
                    version=version,
                )
            )
    except SQLAlchemyError as exc:
        _log.warning("failure_not_recorded", error=type(exc).__name__)
    finally:
        database.dispose()
