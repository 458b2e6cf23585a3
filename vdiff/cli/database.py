"""The database as commands open it that work on it directly: `vdiff keys`, `vdiff secrets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shared.errors import ConfigurationError
from shared.settings import Settings, load_settings
from vdiff.local import with_local_services

if TYPE_CHECKING:
    from shared.db.session import Database


def settings_of_database() -> Settings:
    """Return the settings, with those of a `vdiff up` in the same data folder where none are set."""
    return with_local_services(load_settings())


@contextmanager
def open_database() -> Iterator[Database]:
    """Open the database. Raises ConfigurationError: PostgreSQL is away, or not migrated."""
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from shared.db.session import Database

    database = Database(settings_of_database().require_database_url(), pool_size=1)
    try:
        yield database
    except OperationalError as exc:
        reason = str(exc.orig).strip().splitlines()[0]
        raise ConfigurationError(
            f"cannot reach PostgreSQL: {reason}", param="database_url"
        ) from exc
    except ProgrammingError as exc:
        raise ConfigurationError(
            "the database is not migrated to this version; run `vdiff migrate`"
        ) from exc
    finally:
        database.dispose()
