"""A multipart form that is read in a stream: small fields are kept, the one file goes through,
chunk by chunk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from shared.errors import InvalidBody, InvalidParameter, UnknownParameter, UnsupportedMediaType

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 20

Write = Callable[[bytes], Awaitable[None]]


class Form:
    """The fields of a multipart form beside the file's content."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None  # None: no file came


class _Parts:
    """The parser's callbacks; data of the file is collected until somebody writes it on."""

    def __init__(self, form: Form, file_field: str) -> None:
        self._form = form
        self._file_field = file_field
        self.file_data: list[bytes] = []
        self.ended = False
        self._headers: dict[str, str] = {}
        self._name = b""
        self._value = b""
        self._field: str | None = None  # None: the file
        self._text = b""

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options:
            if name != self._file_field or self._form.filename is not None:
                raise InvalidParameter(
                    f"send one file, in the field {self._file_field!r}", param=name[:80] or "file"
                )
            self._form.filename = options[b"filename"].decode("utf-8", "replace")
            self._field = None
            return
        if name == self._file_field:
            raise InvalidParameter(f"{name} must be a file, with a file name", param=name)
        if name in self._form.fields or len(self._form.fields) >= MAX_FIELDS:
            raise InvalidParameter(f"the field {name[:80]!r} comes too often", param=name[:80])
        self._field, self._text = name, b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self.file_data.append(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise InvalidParameter(f"{self._field[:80]} is too long", param=self._field[:80])

    def on_part_end(self) -> None:
        if self._field is not None:
            try:
                self._form.fields[self._field] = self._text.decode("utf-8")
            except UnicodeDecodeError as exc:
                raise InvalidParameter(
                    f"{self._field[:80]} is not UTF-8", param=self._field[:80]
                ) from exc

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, *, file_field: str, write: Write) -> Form:
    """Read the whole body.

    Raises:
        UnsupportedMediaType: no multipart form.
        InvalidBody: malformed, or cut off.
        InvalidParameter: what a part has in it.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMediaType(
            "the body must be multipart/form-data with a boundary", param="content-type"
        )
    form = Form()
    parts = _Parts(form, file_field)
    callbacks: MultipartCallbacks = {
        "on_part_begin": parts.on_part_begin,
        "on_header_field": parts.on_header_field,
        "on_header_value": parts.on_header_value,
        "on_header_end": parts.on_header_end,
        "on_headers_finished": parts.on_headers_finished,
        "on_part_data": parts.on_part_data,
        "on_part_end": parts.on_part_end,
        "on_end": parts.on_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        async for data in _stream(request):
            parser.write(data)
            for piece in parts.file_data:
                await write(piece)
            parts.file_data.clear()
        parser.finalize()
    except FormParserError as exc:
        raise InvalidBody(
            f"the form is malformed: {exc}", param="body", code="invalid_form"
        ) from exc
    if not parts.ended:
        raise InvalidBody(
            "the form is cut off before its end", param="body", code="incomplete_upload"
        )
    return form


async def _stream(request: Request) -> AsyncIterator[bytes]:
    try:
        async for data in request.stream():
            yield data
    except ClientDisconnect as exc:
        raise InvalidBody(
            "the client left in mid-upload", param="body", code="incomplete_upload"
        ) from exc


def only(form: Form, known: tuple[str, ...]) -> None:
    """Raises UnknownParameter."""
    for name in form.fields:
        if name not in known:
            raise UnknownParameter(
                f"{name[:80]} is not a field here; known: {', '.join(known)}", param=name[:80]
            )
