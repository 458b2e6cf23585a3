"""Ways in which a Redis server refuses its clients, each with its end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

import redis

from vdiff.embedded import EmbeddedRedis
from vdiff.embedded.process import free_port

Change = Callable[[EmbeddedRedis, redis.Redis], object]


def _set(name: str, value: str) -> Change:
    return lambda server, admin: admin.config_set(name, value)


def _become_replica(server: EmbeddedRedis, admin: redis.Redis) -> None:
    admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))


def _become_master(server: EmbeddedRedis, admin: redis.Redis) -> None:
    admin.execute_command("REPLICAOF", "NO", "ONE")


def _change_password(server: EmbeddedRedis, admin: redis.Redis) -> None:
    admin.config_set("requirepass", "another")
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def _restore_password(server: EmbeddedRedis, admin: redis.Redis) -> None:
    admin.config_set("requirepass", (server.folder / "password").read_text())


def _send(number: int) -> Change:
    def send(server: EmbeddedRedis, admin: redis.Redis) -> None:
        assert server.process is not None
        server.process.send_signal(number)

    return send


# name -> what begins the fault, what ends it
FAULTS: Mapping[str, tuple[Change, Change]] = {
    "replica": (_become_replica, _become_master),
    "full": (_set("maxmemory", "1"), _set("maxmemory", "0")),
    "too-few-replicas": (_set("min-replicas-to-write", "1"), _set("min-replicas-to-write", "0")),
    "password": (_change_password, _restore_password),
    "restarted": (lambda server, admin: server.stop(), lambda server, admin: server.start()),
    "stopped": (_send(signal.SIGSTOP), _send(signal.SIGCONT)),
}
