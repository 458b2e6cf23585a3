"""Whether, and after how long, a request is sent again. Pure: no clock of its own, no network.

The rule is that nothing is paid twice. A request is `repeatable` when doing it again changes
nothing: it only reads, or it carries an Idempotency-Key, made once per call and the same in every
attempt. Any other is sent again only when it cannot have arrived (no connection) or when the server
said that it did nothing (429, `overloaded`): another 503 may be of a database that went as it
committed, or of a proxy that gave up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from vdiff.client.errors import ApiError, ClientError, ServerUnreachable, UnexpectedAnswer, kind_of

OnWait = Callable[[float, str], None]

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 10.0
REFUSED = frozenset(
    {"overloaded", "file_store_unavailable", "lock_timeout"}
)  # codes of a 503 that did nothing
AWAY = frozenset({408, 429, 502, 503, 504})
BUG_TRIES = 3  # of an answer 500: it may be a deterministic one
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of the header, whichever of its two forms it has."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def error_of(response: httpx.Response) -> ApiError:
    """The answer as an exception; the body was read. Copes with a proxy's page in the place of our
    problem object.
    """
    body: Any = None
    error: dict[str, Any] = {}
    try:
        body = response.json()
    except ValueError:
        body = response.text
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        error = body["error"]
    status = f"{response.status_code} {response.reason_phrase}".strip()
    message = error.get("message") or f"{response.request.url} answered {status}, not as vdiff does"
    return kind_of(response.status_code)(
        str(message),
        status=response.status_code,
        code=error.get("code"),
        param=error.get("param"),
        retry_after=retry_after(response),
        request_id=response.headers.get("x-request-id"),
        body=body,
    )


class Attempts:
    """The attempts of one call: ask it after each, it says how long to wait, or raises.

    Args:
        repeatable: see the module.
        seconds: how long to go on after the first failure.
        now: a monotonic clock.
        on_wait: told before each wait: seconds, and why.
    """

    def __init__(
        self,
        *,
        repeatable: bool,
        seconds: float,
        now: Callable[[], float],
        on_wait: OnWait | None = None,
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._repeatable = repeatable
        self._seconds = seconds
        self._now = now
        self._on_wait = on_wait
        self._spread = spread
        self._failed_at: float | None = None
        self._failures = 0

    def _wait(self, at_least: float, why: str) -> float | None:
        """The time until the next attempt; None when patience ends before it."""
        now = self._now()
        if self._failed_at is None:
            self._failed_at = now
        backoff = min(FIRST_WAIT_SECONDS * 2 ** min(self._failures, 10), LONGEST_WAIT_SECONDS)
        self._failures += 1
        wait = max(self._spread(backoff / 2, backoff), at_least)
        if now + wait > self._failed_at + self._seconds:
            return None
        if self._on_wait is not None:
            self._on_wait(wait, why)
        return wait

    def after_failure(self, exc: httpx.RequestError, url: str) -> float:
        """No answer came. Raises ServerUnreachable, UnexpectedAnswer, ClientError."""
        if isinstance(exc, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
            raise ClientError(f"{url}: {exc}") from exc
        if isinstance(exc, httpx.DecodingError):
            raise UnexpectedAnswer(f"{url}: an answer that cannot be read: {exc}") from exc
        sent = not isinstance(exc, _NOT_SENT)
        reason = str(exc) or type(exc).__name__
        if sent and not self._repeatable:
            raise ServerUnreachable(
                f"{url}: {reason}; it may have been done, so it was not sent again", sent=True
            ) from exc
        wait = self._wait(0.0, f"{url}: {reason}")
        if wait is None:
            raise ServerUnreachable(f"{url}: {reason}", sent=sent) from exc
        return wait

    def after_answer(self, response: httpx.Response) -> float | None:
        """None: the answer is good. Raises ApiError for one that is not, and that waiting does not
        mend; UnexpectedAnswer.
        """
        status = response.status_code
        if 300 <= status < 400:  # not followed: the key is for the address that was given
            to = response.headers.get("location", "nowhere")
            raise UnexpectedAnswer(
                f"{response.request.url} redirects to {to}; give the address that answers"
            )
        if status < 400:
            return None
        error = error_of(response)
        again = (
            status in AWAY
            if self._repeatable
            else status == 429 or (status == 503 and error.code in REFUSED)
        )
        if status == 500 and self._repeatable:
            again = self._failures + 1 < BUG_TRIES
        if status == 409 and self._repeatable and error.code == "conflict":
            again = True  # the same key is being worked on this moment
        if response.headers.get("x-should-retry") == "false":
            again = False
        wait = self._wait(error.retry_after or 0.0, error.message) if again else None
        if wait is None:
            raise error
        return wait
