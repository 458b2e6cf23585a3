"""Exit codes, for scripts, and which error gets which. docs/cli.md prints this table."""

from __future__ import annotations

from shared.errors import Conflict, NotFound, VDiffError

OK, FAILED, USAGE, UNREACHABLE, REFUSED, MISSING, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

MEANINGS = {
    OK: "done",
    FAILED: "a job, a line of a file or a check did not succeed; or what was asked does not fit the job's state (409)",
    USAGE: "an option, a setting or the request itself is wrong; one line says which",
    UNREACHABLE: "the server does not answer, or answered 5xx",
    REFUSED: "the API key is missing, unknown or lacks a scope, or a limit is reached (401, 403, 429)",
    MISSING: "there is no such job, batch, evaluation, file, model or key, or it was purged (404, 410)",
    TIMEOUT: "not finished within `--timeout`; the work continues",
    INTERRUPTED: "Ctrl-C; submitted work continues",
}


ADDRESS = "VDIFF_BASE_URL or --base-url says where the server is"


def advice(exc: Exception) -> str:
    """Return the advice to print after an error that ends a command; empty where the error contains
    it.
    """
    from vdiff.client import errors as e

    if isinstance(exc, e.ServerUnreachable):
        return f"; is a server running? `vdiff up` starts one, {ADDRESS}"
    if isinstance(exc, e.UnexpectedAnswer):
        return f"; {ADDRESS}"
    if isinstance(exc, e.AuthenticationFailed):
        return " (VDIFF_API_KEY or --api-key gives it)"
    if isinstance(exc, e.ServerError) and exc.code is None:
        return f"; a proxy that does not reach it, or another server: {ADDRESS}"
    if isinstance(exc, e.ServerError):
        return f" ({exc.status} {exc.code}, {exc.request_id}); `vdiff doctor` beside the server looks at every part"
    return ""


def exit_code(exc: Exception) -> int:
    """Return the exit code of an error that ends a command."""
    if isinstance(exc, NotFound):
        return MISSING
    if isinstance(exc, Conflict):
        return FAILED
    if isinstance(exc, VDiffError):
        return USAGE
    from vdiff.client import (
        errors as e,
    )  # only now: commands that need no server start without httpx

    if isinstance(exc, e.JobFailed):
        return FAILED
    if isinstance(exc, e.WaitTimeout):
        return TIMEOUT
    if isinstance(exc, e.ServerUnreachable | e.UnexpectedAnswer | e.ServerError):
        return UNREACHABLE
    if isinstance(exc, e.AuthenticationFailed | e.PermissionDenied | e.RateLimited):
        return REFUSED
    if isinstance(exc, e.NotFound | e.Gone):
        return MISSING
    if isinstance(exc, e.Conflict):
        return FAILED
    return USAGE
