"""The API as a process: uvicorn with our application, our logs, and an end that does not cancel
anybody's job.
"""

from __future__ import annotations

import signal
import socket
import sys
from typing import Any

import uvicorn

from api.app import create_app
from api.connections import protocol_class
from migrations import run as migrations
from shared import tracing
from shared.background import EXIT_THREAD_GONE
from shared.db.session import Database
from shared.errors import ConfigurationError
from shared.logging import setup_logging
from shared.settings import Settings
from shared.vault import vault_of
from shared.webhooks import stored_secrets

GRACE_SECONDS = 3  # what open requests get at the end
BACKLOG = 2048


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigurationError naming host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
    )  # accepted ones inherit it: a dead peer shows
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        message = f"cannot listen on {host}:{port}: {exc.strerror or exc}; choose another with --port or VDIFF_PORT"
        raise ConfigurationError(message, param="port") from exc
    return listener


class _Server(uvicorn.Server):
    """Says that it stops before it cuts the requests that still wait, so that these do not look
    like clients who left.
    """

    failure: str | None = None

    def fail(self, reason: str) -> None:
        """Shut down because a background part of the process ended; any thread may call it."""
        self.failure = self.failure or reason
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        context = getattr(self.config.app.state, "context", None)  # type: ignore[union-attr]
        if context is not None:
            context.stop()
        await super().shutdown(sockets)


def require_secret_keys(settings: Settings) -> None:
    """Raise ConfigurationError if a stored secret has a key that is not among those of the
    settings.
    """
    database = Database(settings.require_database_url(), pool_size=1)
    try:
        with database.read() as session:
            stored_secrets.check(session, vault_of(settings.secret_keys))
    finally:
        database.dispose()


def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code.

    Raises:
        ConfigurationError: the port is taken, PostgreSQL is away or not migrated, a key of stored
            secrets is missing.
    """
    setup_logging(settings.log_level, settings.log_format)
    tracing.start("api")
    migrations.require_current(settings.require_database_url())
    require_secret_keys(settings)
    app = create_app(settings)
    listener = listening_socket(settings.host, settings.port)
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "ws": "none",
    }
    options |= {"http": protocol_class(settings), "timeout_keep_alive": settings.keep_alive_seconds}
    server = _Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE_SECONDS, **options))
    app.state.on_gone = server.fail
    # uvicorn stops at these, then raises them again; for us they are a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    server.run(sockets=[listener])
    tracing.stop()
    if server.failure is not None:
        print(f"vdiff api: {server.failure}; the process ends", file=sys.stderr, flush=True)
        return EXIT_THREAD_GONE
    return 0 if server.started else 1
