"""Requests about webhooks: their checks, and rows as the wire shows them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.ids import is_id
from shared.jobs.fields import metadata_of
from shared.webhooks.events import DEFAULT_TYPES, JOB_TYPES, event_types
from shared.webhooks.targets import parse_target

ENDPOINT_FIELDS = ("url", "events", "description", "metadata_filter", "inline_result", "enabled")
JOB_FIELDS = ("url", "endpoint_id", "events", "inline_result")
MAX_DESCRIPTION = 500


def _object(value: Any, known: tuple[str, ...], prefix: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter(f"{what} must be an object", param=prefix.rstrip(".") or "body")
    for name in value:
        if name not in known:
            param = f"{prefix}{name[:80]}"
            raise UnknownParameter(
                f"{param} is not a field of {what}; known: {', '.join(known)}", param=param
            )
    return {k: v for k, v in value.items() if v is not None}


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameter(f"{param} must be true or false", param=param)
    return value


def endpoint_values(value: Any, *, allow_private: bool, partial: bool) -> dict[str, Any]:
    """Columns of an endpoint that a body gives. Raises InvalidParameter, MissingParameter,
    UnknownParameter.
    """
    given = _object(value, ENDPOINT_FIELDS, "", "a webhook endpoint")
    values: dict[str, Any] = {}
    if "url" in given:
        parse_target(given["url"], allow_private=allow_private)
        values["url"] = given["url"]
    elif not partial:
        raise MissingParameter("url is required", param="url")
    if "events" in given or not partial:
        values["events"] = event_types(given.get("events", DEFAULT_TYPES), "events")
    if "description" in given:
        text = given["description"]
        if not isinstance(text, str) or len(text) > MAX_DESCRIPTION:
            raise InvalidParameter(
                f"description must be a string of at most {MAX_DESCRIPTION} characters",
                param="description",
            )
        values["description"] = text
    if "metadata_filter" in given:
        values["metadata_filter"] = metadata_of(given["metadata_filter"], "metadata_filter")
    for name in ("inline_result", "enabled"):
        if name in given:
            values[name] = _flag(given[name], name)
    if values.get("enabled"):
        values["disabled_reason"] = None
    return values


def job_webhook(value: Any, *, allow_private: bool) -> dict[str, Any] | None:
    """The `webhook` of a job, as its column holds it. Raises InvalidParameter, MissingParameter,
    UnknownParameter.
    """
    if value is None:
        return None
    given = _object(value, JOB_FIELDS, "webhook.", "webhook")
    if ("url" in given) == ("endpoint_id" in given):
        raise MissingParameter("webhook needs one of url and endpoint_id", param="webhook.url")
    made: dict[str, Any] = {
        "events": event_types(given.get("events", DEFAULT_TYPES), "webhook.events", JOB_TYPES)
    }
    if "url" in given:
        parse_target(given["url"], allow_private=allow_private, param="webhook.url")
        made["url"] = given["url"]
        made["inline_result"] = _flag(given.get("inline_result", False), "webhook.inline_result")
        return made
    if "inline_result" in given:
        raise InvalidParameter(
            "webhook.inline_result is the endpoint's own setting; leave it out",
            param="webhook.inline_result",
        )
    if not isinstance(given["endpoint_id"], str) or not is_id(given["endpoint_id"], "we"):
        raise InvalidParameter(
            "webhook.endpoint_id must be the id of a webhook endpoint", param="webhook.endpoint_id"
        )
    return {**made, "endpoint_id": given["endpoint_id"]}


def _moment(value: Any) -> int | None:
    return None if value is None else int(value.timestamp())


def endpoint_object(row: Mapping[Any, Any], *, secret: str | None = None) -> dict[str, Any]:
    """Return an endpoint as the API shows it.

    Args:
        secret: the secret in clear, to be shown because it was made a moment ago.
    """
    return {
        "id": row["id"],
        "object": "webhook_endpoint",
        "url": row["url"],
        "events": row["events"],
        "description": row["description"],
        "metadata_filter": row["metadata_filter"],
        "inline_result": row["inline_result"],
        "enabled": row["enabled"],
        "disabled_reason": row["disabled_reason"],
        "last_success_at": _moment(row["last_success_at"]),
        "created_at": _moment(row["created_at"]),
        **({} if secret is None else {"secret": secret}),
    }


def delivery_object(row: Mapping[Any, Any], attempts: list[Mapping[Any, Any]]) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        "object": "webhook_delivery",
        "event_id": row["event_id"],
        "type": row["type"],
        "job_id": row["job_id"],
        "batch_id": row["batch_id"],
        "sequence": row["sequence"],
        "endpoint_id": row["endpoint_id"],
        "url": row["url"],
        "status": row["status"],
        "next_attempt_at": _moment(row["next_attempt_at"]) if row["status"] == "pending" else None,
        "created_at": _moment(row["created_at"]),
        "delivered_at": _moment(row["delivered_at"]),
        "attempts": [
            {
                "attempt": a["attempt"],
                "status_code": a["status_code"],
                "error": a["error"],
                "duration_ms": a["duration_ms"],
                "created_at": _moment(a["created_at"]),
            }
            for a in attempts
        ],
    }
