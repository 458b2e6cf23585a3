"""The one way from an endpoint's body to a checked request, for all endpoints that are jobs."""

from __future__ import annotations

from typing import Any

from shared.errors import InvalidParameter
from shared.jobs import echo, infill, prompts, requests, response_requests, scoring
from shared.jobs.infill import InfillRequest
from shared.jobs.prompts import PromptsRequest
from shared.jobs.requests import ParsedRequest
from shared.jobs.response_requests import ResponseRequest
from shared.jobs.responses import COMPLETIONS, ENDPOINTS, INFILL, LOGLIKELIHOOD, RESPONSES
from shared.jobs.scoring import ScoreRequest

Request = ParsedRequest | PromptsRequest | ResponseRequest | InfillRequest | ScoreRequest


def parse(endpoint: str, body: Any, *, streaming: bool) -> Request:
    """Check the shape of an endpoint's body.

    Args:
        streaming: whether `stream` may be asked for (not inside a job).

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the field's full name.
    """
    if endpoint not in ENDPOINTS:
        raise InvalidParameter(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if endpoint == RESPONSES:
        return response_requests.parse(body, streaming=streaming)
    if endpoint == INFILL:
        return infill.parse(body)
    if endpoint == LOGLIKELIHOOD:
        return scoring.parse(body)
    if endpoint == COMPLETIONS and echo.is_asked(body):
        return echo.parse(body)
    if endpoint == COMPLETIONS and prompts.are_several(body):
        return prompts.parse(body, streaming=streaming)
    return requests.parse(endpoint, body, streaming=streaming)
