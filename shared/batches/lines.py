"""Lines of a batch's input, and of its output. Pure.

Input    {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}} Output
{"id": "batch_req_...", "custom_id": ..., "response": {status_code, request_id, body} | null,
"error": ... | null}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidParameter, InvalidRequest, MissingParameter, UnknownParameter
from shared.jobs.status import JobStatus
from shared.strict_json import parse_json
from shared.text_files import UTF8_MARK, require_utf8

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_CUSTOM_ID = 256
FIELDS = ("custom_id", "method", "url", "body")


class LineTooLong(InvalidRequest):
    code = "line_too_long"


class LineSplitter:
    """Bytes in, numbered lines out; never holds more than one line, and of a line that is too long
    only that it is.
    """

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._number = 1

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts.clear()
        else:
            self._parts.append(piece)

    def _end(self) -> tuple[int, bytes | None]:
        line = None if self._size > self._max else b"".join(self._parts)
        number = self._number
        self._parts, self._size, self._number = [], 0, number + 1
        return number, line

    def feed(self, data: bytes) -> list[tuple[int, bytes | None]]:
        """The lines that end in `data`, numbered from 1; None for one that is too long."""
        *ended, rest = data.split(b"\n")
        lines = []
        for piece in ended:
            self._add(piece)
            lines.append(self._end())
        self._add(rest)
        return lines

    def finish(self) -> list[tuple[int, bytes | None]]:
        """The last line, when no newline ends it."""
        return [self._end()] if self._size else []


@dataclass(frozen=True, slots=True)
class InputLine:
    number: int
    custom_id: str
    body: dict[str, Any]


def has_request(number: int, raw: bytes | None) -> bool:
    """Return whether a line is a request, good or bad: it is not empty."""
    return raw is None or bool((raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip())


def parse_line(number: int, raw: bytes | None, endpoint: str) -> InputLine | None:
    """One request; None for an empty line.

    Raises:
        InvalidRequest: of its kinds, `param` being the line's field.
    """
    if raw is None:
        raise LineTooLong(f"the line is longer than {MAX_LINE_BYTES} bytes")
    if number == 1:
        require_utf8(raw, "the file")
        raw = raw.removeprefix(UTF8_MARK)
    if not raw.strip():
        return None
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise InvalidParameter("the line must be a JSON object")
    for name in value:
        if name not in FIELDS:
            raise UnknownParameter(
                f"{name[:80]} is not a field of a line; known: {', '.join(FIELDS)}", param=name[:80]
            )
    for name in FIELDS:
        if value.get(name) is None:
            raise MissingParameter(f"{name} is required", param=name)
    custom_id = value["custom_id"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise InvalidParameter(
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", param="custom_id"
        )
    if value["method"] != "POST":
        raise InvalidParameter("method must be POST", param="method")
    if value["url"] != endpoint:
        raise InvalidParameter(
            f"url must be {endpoint}, the batch's endpoint", param="url", code="mismatched_endpoint"
        )
    if not isinstance(value["body"], dict):
        raise InvalidParameter("body must be an object", param="body")
    return InputLine(number, custom_id, value["body"])


def output_line(row: Mapping[Any, Any]) -> bytes:
    """A finished job as a line of the output file (it succeeded) or of the error file.

    In ASCII: clients split the text with str.splitlines, which breaks at U+2028, U+0085 and others
    too.
    """
    return (json.dumps(output_object(row), separators=(",", ":")) + "\n").encode()


def unstored_line(batch_id: str, line: InputLine, error: Mapping[str, Any]) -> bytes:
    """A line of the error file for a line of the input that never became a job."""
    shown = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{line.number}",
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": error["code"], "message": error["message"]},
    }
    return (json.dumps(shown, separators=(",", ":")) + "\n").encode()


def output_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    job_id = row["id"]
    common = {"id": f"batch_req_{job_id.removeprefix('job_')}", "custom_id": row["custom_id"]}
    if row["status"] == JobStatus.SUCCEEDED and row["result"] is not None:
        return {**common, "response": _response(job_id, 200, row["result"]), "error": None}
    if row["purged_at"] is not None:
        error = {
            "code": "job_purged",
            "message": "the line's result was purged before this file was written",
        }
        return {**common, "response": None, "error": error}
    error = row["error"] or {
        "code": row["status"],
        "message": f"the job is {row['status']}",
        "param": None,
    }
    if row["status"] == JobStatus.FAILED:
        body = {
            "error": {
                "message": error["message"],
                "type": "server_error",
                "param": error["param"],
                "code": error["code"],
            }
        }
        return {**common, "response": _response(job_id, 500, body), "error": None}
    code = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(
        row["status"], str(error["code"])
    )
    return {**common, "response": None, "error": {"code": code, "message": error["message"]}}


def _response(job_id: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": job_id, "body": body}
