"""The file in the data folder by which other commands find the services of `vdiff up`; readable by
its owner alone.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from shared.errors import ConfigurationError
from shared.settings import Settings
from shared.vault import new_key, parse_keys

_FILE = "running.json"
SECRET_KEY_FILE = "secret.key"  # encrypts the secrets in the PostgreSQL of the same folder


def publish(data_dir: Path, *, database_url: str, redis_url: str, api_url: str) -> None:
    """Write where everything is; it holds passwords."""
    file = data_dir / _FILE
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump({"database_url": database_url, "redis_url": redis_url, "api_url": api_url}, out)


def ensure_secret_key(data_dir: Path) -> SecretStr:
    """Return the key of the folder's own PostgreSQL; the first call makes it, readable by its owner
    alone.

    Raises:
        ConfigurationError: the file cannot be used.
    """
    file = data_dir / SECRET_KEY_FILE
    try:
        with suppress(FileExistsError):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(new_key() + "\n")
        text = file.read_text().strip()
        if not parse_keys(text):
            raise ValueError("it is empty")
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise ConfigurationError(
            f"{file} holds no usable key: {why}; restore it from a backup"
        ) from exc
    return SecretStr(text)


def withdraw(data_dir: Path) -> None:
    (data_dir / _FILE).unlink(missing_ok=True)


def _running(settings: Settings) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((settings.data_dir.expanduser() / _FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found


def with_local_services(settings: Settings) -> Settings:
    """The settings, with the URLs of a `vdiff up` in the same data folder where none are set."""
    running = _running(settings)
    missing: dict[str, str] = {
        name: running[name]
        for name in ("database_url", "redis_url")
        if getattr(settings, name) is None and name in running
    }
    secrets: dict[str, SecretStr] = {}
    if settings.secret_keys is None and settings.database_url is None:
        with suppress(OSError):
            text = (settings.data_dir.expanduser() / SECRET_KEY_FILE).read_text().strip()
            secrets["secret_keys"] = SecretStr(text)
    return settings.model_copy(update={**missing, **secrets})


def api_url(settings: Settings) -> str:
    """Return the API's address: as set, else that of `vdiff up` in the same data folder, else by
    host and port.
    """
    if settings.base_url is not None:
        return settings.base_url
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses to listen on, not to connect to
    host = anywhere.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return _running(settings).get("api_url") or f"http://{host}:{settings.port}"
