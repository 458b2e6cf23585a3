"""Errors between a program and a vdiff server.

    ClientError
    ├── ServerUnreachable          no answer, and no more patience; `sent` says whether the request
                                   may have arrived
    ├── UnexpectedAnswer           what answered is no vdiff server
    ├── ApiError                   the server said no: status, code, param, retry_after, request_id,
                                   body
    │   ├── BadRequest             400, 405, 413, 415, 422
    │   ├── AuthenticationFailed   401
    │   ├── PermissionDenied       403
    │   ├── NotFound               404
    │   ├── Conflict               409
    │   ├── Gone                   410   input and output were purged
    │   ├── RateLimited            429
    │   └── ServerError            5xx
    ├── JobFailed                  a job ended otherwise than `succeeded`; `job` has everything
    ├── WaitTimeout                not over in time; it goes on, and nothing is lost (also a
                                   TimeoutError)
    └── InvalidWebhook             a webhook that the secret did not sign, or an old one

`code` and `param` are the server's own words (docs/api.md lists them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdiff.client.types import Job


class ClientError(Exception):
    """Base of all."""

    code: str | None = None
    param: str | None = None
    status: int | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ServerUnreachable(ClientError):
    code = "server_unreachable"

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class UnexpectedAnswer(ClientError):
    code = "unexpected_answer"


class ApiError(ClientError):
    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.request_id = request_id
        self.body = body


class BadRequest(ApiError):
    pass


class AuthenticationFailed(ApiError):
    pass


class PermissionDenied(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class Gone(ApiError):
    pass


class RateLimited(ApiError):
    pass


class ServerError(ApiError):
    pass


KINDS: dict[int, type[ApiError]] = {
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: RateLimited,
}


def kind_of(status: int) -> type[ApiError]:
    return KINDS.get(status, BadRequest if status < 500 else ServerError)


class JobFailed(ClientError):
    def __init__(self, job: Job) -> None:
        error = job.error or {}
        said, why = f"{job.id} {job.status}", error.get("message")
        if error.get("code") != job.status:  # else the message says no more than the status
            said += f": {why or 'no result'}"
        super().__init__(said)
        self.job = job
        self.code = error.get("code") or job.status
        self.param = error.get("param")


class WaitTimeout(ClientError, TimeoutError):
    code = "wait_timeout"


class InvalidWebhook(ClientError):
    code = "invalid_webhook"
