"""Server-sent events from bytes. Pure; made for our own streams, whose data is one line of JSON."""

from __future__ import annotations

import json

from shared.canvas import CanvasReader
from vdiff.client.types import Event


class EventParser:
    """Feed it what arrives, in any pieces; comments (keep-alives) are dropped.

    A canvas that the server tells as a change stands whole under `canvas`, as the first one does.
    """

    def __init__(self, canvases: dict[int, CanvasReader] | None = None) -> None:
        """Args: canvases: what earlier connections of the same stream told, answer by answer."""
        self._canvases = {} if canvases is None else canvases
        self._rest = b""
        self._fields: dict[str, str] = {}

    def feed(self, piece: bytes) -> list[Event]:
        lines = (self._rest + piece).split(
            b"\n"
        )  # not splitlines(): U+2028 in a text is no end of a line
        self._rest = lines.pop()
        found = []
        for raw in lines:
            line = raw.rstrip(b"\r").decode()
            if not line:
                if "data" in self._fields:
                    found.append(self._event())
                self._fields = {}
            elif not line.startswith(":"):
                name, _, value = line.partition(":")
                self._fields[name] = value.removeprefix(" ")
        return found

    def _event(self) -> Event:
        event = Event(
            self._fields.get("id", ""),
            self._fields.get("event", "message"),
            json.loads(self._fields["data"]),
        )
        if event.type == "progress":
            reader = self._canvases.setdefault(event.data.get("index", 0), CanvasReader())
            if reader.hear(event.data):
                event.data["canvas"] = reader.canvas
        return event
