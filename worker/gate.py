"""Lets attempts in side by side, or only those that run apart from all others."""

from __future__ import annotations

import threading


class Gate:
    """Thread-safe. `enter` and `enter_apart` are each followed by one `leave`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._closed = False

    @property
    def is_open(self) -> bool:
        return not self._closed

    @property
    def is_empty(self) -> bool:
        return self._inside == 0

    @property
    def waiting(self) -> int:
        """Return how many attempts wait in `enter`."""
        return self._waiting

    def enter(self, timeout_seconds: float) -> bool:
        """Come in; return False when the gate stays closed for so long."""
        with self._changed:
            self._waiting += 1
            try:
                if not self._changed.wait_for(lambda: not self._closed, timeout_seconds):
                    return False
            finally:
                self._waiting -= 1
            self._inside += 1
            return True

    def enter_apart(self) -> None:
        """Come in past the closed gate."""
        with self._changed:
            self._inside += 1

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody else in; those inside go on."""
        with self._changed:
            self._closed = True

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()

    def wait_empty(self, timeout_seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, timeout_seconds)
