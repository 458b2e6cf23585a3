"""The server's address and the HTTP options that the sync and the async client share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from shared.errors import ConfigurationError
from shared.settings import load_settings
from vdiff.client.calls import Call
from vdiff.client.errors import ClientError, InvalidWebhook, UnexpectedAnswer
from vdiff.local import api_url
from vdiff.version import __version__

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
STREAM_SILENCE_SECONDS = 45.0  # the server sends a comment about every second
MAP_RETRY_SECONDS = 600.0
RETRY_SECONDS = 60.0

T = TypeVar("T")


class Connection:
    """Checked settings of a client.

    Args:
        base_url: default VDIFF_BASE_URL, else a `vdiff up` that runs in this folder, else
            http://127.0.0.1:8000.
        api_key: default VDIFF_API_KEY; a server on loopback needs none.

    Raises:
        ConfigurationError: an argument or a VDIFF_* variable is wrong.
    """

    def __init__(
        self, base_url: str | None, api_key: str | None, model: str | None, retry_seconds: float
    ) -> None:
        settings = load_settings()
        url = (base_url or api_url(settings)).rstrip("/").removesuffix("/v1")
        if not is_address(url):
            raise ConfigurationError(
                f"base_url must be like http://host:port, not {url!r}", param="base_url"
            )
        key = api_key or (settings.api_key.get_secret_value() if settings.api_key else None)
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigurationError(
                "the API key has characters that a header cannot have", param="api_key"
            )
        if retry_seconds < 0:
            raise ConfigurationError("retry_seconds must be at least 0", param="retry_seconds")
        self.url = url
        self.model = model
        self.retry_seconds = retry_seconds
        self._key = key

    def http_options(self) -> dict[str, Any]:
        """For httpx.Client and httpx.AsyncClient."""
        headers = {"User-Agent": f"vdiff-client/{__version__}", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        return {
            "base_url": self.url,
            "headers": headers,
            "timeout": httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            # As many as `map` is told to use at once; a pool that is full would count as a failure.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
        }


def is_address(url: str) -> bool:
    """Return whether a server can be asked for there."""
    try:
        parts = httpx.URL(url)
        parts.host.encode("idna")
        return parts.scheme in ("http", "https") and bool(parts.host) and parts.port != 0
    except (httpx.InvalidURL, ValueError):
        return False


def request_options(call: Call[Any]) -> dict[str, Any]:
    """For `request` of either httpx client."""
    return {
        "json": call.json,
        "params": dict(call.params),
        "headers": dict(call.headers),
        "timeout": httpx.Timeout(READ_SECONDS + call.wait_seconds, connect=CONNECT_SECONDS),
    }


def read_answer(read: Callable[[Any], T], response: httpx.Response, *, text: bool = False) -> T:
    """Raises UnexpectedAnswer: the address belongs to something else."""
    try:
        return read(response.text if text else response.json())
    except (ValueError, KeyError, TypeError) as exc:
        raise UnexpectedAnswer(
            f"{response.request.url}: no answer of a vdiff server: {response.text[:80]!r}"
        ) from exc


def require_stream(response: httpx.Response) -> None:
    """Raises UnexpectedAnswer: these are no events."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise UnexpectedAnswer(f"{response.request.url}: no event stream but {kind or 'nothing'}")


def verify_webhook(body: bytes | str, headers: Mapping[str, str], secret: str) -> dict[str, Any]:
    """The event of a webhook, after its signature and its age (5 minutes) were checked, as Standard
    Webhooks has it.

    Args:
        body: exactly as received.
        headers: of the request, in any case.
        secret: `whsec_...`: the endpoint's, or the one of `webhook_secret()` for webhooks of single
            jobs.

    Raises:
        InvalidWebhook: do not believe it, answer 400.
    """
    from standardwebhooks import Webhook, WebhookVerificationError
    from standardwebhooks.webhooks import EmptyWebhookSecretError

    try:
        hook = Webhook(secret)
    except (ValueError, EmptyWebhookSecretError) as exc:
        raise ClientError("a webhook secret is whsec_ and base64") from exc
    try:
        event = hook.verify(body, dict(headers))
    except (
        WebhookVerificationError,
        ValueError,
    ) as exc:  # ValueError: no base64, no UTF-8, no JSON
        raise InvalidWebhook(f"not a webhook of ours: {exc}") from exc
    if not isinstance(event, dict):
        raise InvalidWebhook("the body is no event")
    return event
