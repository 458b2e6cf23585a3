"""Every error that vdiff raises on purpose, with what the wire says about it.

    VDiffError
    ├── InvalidRequest            400 invalid_request_error    the client sent something wrong; `param` names it
    │   ├── InvalidParameter      400 invalid_parameter        one field has a bad value
    │   ├── UnknownParameter      400 unknown_parameter        a field that does not exist here
    │   ├── MissingParameter      400 missing_parameter
    │   ├── PromptTooLong         400 context_length_exceeded
    │   └── InvalidBody           400 invalid_json / invalid_utf8
    ├── BodyTooLarge              413 body_too_large
    ├── NotAuthenticated          401 invalid_api_key
    ├── QuotaExceeded             403 quota_exceeded           the tenant stores all that it may
    ├── Forbidden                 403 insufficient_scope       the key is good, but not for this
    ├── NotFound                  404 not_found
    │   ├── ModelNotFound         404 model_not_found
    │   └── JobNotFound           404 job_not_found
    ├── Conflict                  409 conflict
    ├── IdempotencyMismatch       422 idempotency_key_reused    the same key with another body
    ├── UnsupportedMediaType      415 unsupported_media_type
    ├── Gone                      410 gone
    ├── TooManyRequests           429 rate_limit_exceeded       retryable
    ├── Overloaded                503 overloaded                retryable
    ├── WaitTimeout               504 wait_timeout              the job goes on; ask for it by id
    ├── EngineError               500 engine_error              retryable
    │   ├── OutOfMemory           500 out_of_memory             retryable
    │   ├── NotFinite             500 not_finite                the model produced NaN or infinity
    │   ├── SchemaViolated        500 answer_violates_schema   a structured answer is not what its schema asks for
    │   ├── EngineShutDown        503 engine_shut_down          retryable
    │   └── EngineStopped         500 engine_stopped            retryable   it took every job of its batch with it
    ├── ModelLoadError            500 model_load_failed         names the tensor or file
    └── ConfigurationError        exit code 2                   a setting stops the process, with name and reason

`code` is machine-readable and stable, `param` is the full name of the field
(`diffusion.threshold`). `retryable` says whether the same request may succeed later; workers use it
to decide on another attempt.
"""

from __future__ import annotations

from collections.abc import Mapping

RETRY_AFTER_MAX_SECONDS = 120  # the SDKs ignore longer ones


class VDiffError(Exception):
    """Base of all errors; carries what an API answer or a job row needs."""

    code = "internal_error"
    http_status = 500
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(VDiffError):
    code = "invalid_request"
    http_status = 400


class InvalidParameter(InvalidRequest):
    code = "invalid_parameter"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class MissingParameter(InvalidRequest):
    code = "missing_parameter"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class InvalidBody(InvalidRequest):
    code = "invalid_json"


class BodyTooLarge(VDiffError):
    code = "body_too_large"
    http_status = 413


class QuotaExceeded(VDiffError):
    """Error for a request that would exceed what the tenant may store; the tenant has to delete
    something.
    """

    code = "quota_exceeded"
    http_status = 403


class NotAuthenticated(VDiffError):
    code = "invalid_api_key"
    http_status = 401


class Forbidden(VDiffError):
    code = "insufficient_scope"
    http_status = 403


class NotFound(VDiffError):
    code = "not_found"
    http_status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class JobNotFound(NotFound):
    code = "job_not_found"


class Conflict(VDiffError):
    code = "conflict"
    http_status = 409


class IdempotencyMismatch(VDiffError):
    code = "idempotency_key_reused"
    http_status = 422


class UnsupportedMediaType(VDiffError):
    code = "unsupported_media_type"
    http_status = 415


class Gone(VDiffError):
    code = "gone"
    http_status = 410


class TooManyRequests(VDiffError):
    code = "rate_limit_exceeded"
    http_status = 429
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float = 5.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})


class Overloaded(VDiffError):
    code = "overloaded"
    http_status = 503
    retryable = True


class WaitTimeout(VDiffError):
    code = "wait_timeout"
    http_status = 504


class EngineError(VDiffError):
    code = "engine_error"
    retryable = True


class OutOfMemory(EngineError):
    code = "out_of_memory"


class NotFinite(EngineError):
    code = "not_finite"
    retryable = False


class SchemaViolated(EngineError):
    code = "answer_violates_schema"
    retryable = False


class EngineShutDown(EngineError):
    code = "engine_shut_down"
    http_status = 503


class EngineStopped(EngineError):
    code = "engine_stopped"


class ModelLoadError(VDiffError):
    code = "model_load_failed"


class ConfigurationError(VDiffError):
    code = "configuration_error"
