"""Rules about webhooks, for `tests.chaos.checker`. Pure; the signatures are computed here, by hand."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections import defaultdict
from collections.abc import Callable, Iterator

from tests.chaos.records import Database, History, Received

TOLERANCE_SECONDS = 300  # between a signature's moment and its arrival, as Standard Webhooks has it
KINDS = {"queued": "job.queued", "running": "job.started"}
Found = Iterator[tuple[str, str]]
Event = tuple[str, str, str, int]  # receiver, job, type, sequence


def _kind(status: str) -> str:
    return KINDS.get(status, f"job.{status}")


def _moves(database: Database) -> dict[str, list[tuple[str, int]]]:
    """The events that each job's moves are: (type, sequence)."""
    events: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for move in sorted(database.moves, key=lambda m: m.n):
        if move.before != move.after and move.after != "deleted":
            mine = events[move.job_id]
            mine.append((_kind(move.after), len(mine) + 1))
    return events


def _parsed(received: Received) -> Event | None:
    try:
        body = json.loads(received.body)
        return received.receiver, body["data"]["id"], body["type"], body["data"]["sequence"]
    except (ValueError, KeyError, TypeError):
        return None


def events_arrive(history: History, database: Database) -> Found:
    """Every move that somebody subscribed to arrived and was taken; what the sender has left is
    nothing.
    """
    taken = {
        _parsed(r) for r in history.received if r.answered is not None and 200 <= r.answered < 300
    }
    events = _moves(database)
    jobs = {accepted.job_id: accepted for accepted in history.accepted}
    for job_id, accepted in jobs.items():
        for kind, sequence in events.get(job_id, ()):
            for receiver, wanted in (
                (f"own/{accepted.tenant}", kind in accepted.hooks),
                (f"endpoint/{accepted.tenant}", accepted.labelled),
            ):
                if wanted and (receiver, job_id, kind, sequence) not in taken:
                    yield job_id, f"{kind} (sequence {sequence}) never reached {receiver}"
    if database.pending_deliveries:
        yield "deliveries", f"{database.pending_deliveries} are still to be sent"


def events_are_true(history: History, database: Database) -> Found:
    """Check that each event reports a move that was made, under one id and with the same body each
    time.
    """
    events = {job_id: set(moves) for job_id, moves in _moves(database).items()}
    ids: dict[Event, set[str]] = defaultdict(set)
    bodies: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    for received in history.received:
        if received.receiver == "redirected":
            yield "redirected", "a redirect was followed"
            continue
        event = _parsed(received)
        webhook_id = received.headers.get("webhook-id", "")
        if event is None or json.loads(received.body).get("id") != webhook_id:
            yield webhook_id, f"arrived with a body that is none: {received.body[:80]!r}"
            continue
        _, job_id, kind, sequence = event
        if (kind, sequence) not in events.get(job_id, set()):
            yield job_id, f"{kind} (sequence {sequence}) arrived, and there was no such move"
        row = database.jobs.get(job_id)
        if row is not None and received.receiver.partition("/")[2] != row.tenant:
            yield job_id, f"its event went to {received.receiver}"
        ids[event].add(webhook_id)
        bodies[received.receiver, webhook_id].add(received.body)
    for (receiver, job_id, kind, _), found in ids.items():
        if len(found) > 1:
            yield job_id, f"{kind} reached {receiver} under {len(found)} ids"
    for (_, webhook_id), said in bodies.items():
        if len(said) > 1:
            yield webhook_id, f"said {len(said)} different things"


def events_are_signed(history: History, database: Database) -> Found:
    """Each request has a good signature of the secret that its receiver knows, made just then."""
    for received in history.received:
        secret = history.secrets.get(received.receiver)
        if secret is None:
            continue
        webhook_id, moment = (
            received.headers.get(f"webhook-{name}", "") for name in ("id", "timestamp")
        )
        signed = f"{webhook_id}.{moment}.".encode() + received.body
        key = base64.b64decode(secret.removeprefix("whsec_"))
        good = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        if good not in received.headers.get("webhook-signature", "").split():
            yield webhook_id, f"reached {received.receiver} with a bad signature"
        elif not moment.isdigit() or abs(int(moment) - received.at) > TOLERANCE_SECONDS:
            yield webhook_id, f"was signed at {moment} and arrived at {received.at:.0f}"


RULES: dict[str, Callable[[History, Database], Found]] = {
    "events arrive": events_arrive,
    "events are true": events_are_true,
    "events are signed": events_are_signed,
}
