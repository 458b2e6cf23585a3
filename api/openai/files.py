"""`/v1/files`, OpenAI's: uploaded and downloaded in a stream."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from api.auth import PrincipalDep, requires
from api.dependencies import ContextDep
from api.multipart import Form, only, read_form
from api.paging import no_nul, page_limit, page_object, whole_number
from shared.errors import InvalidParameter, MissingParameter
from shared.files.service import PURPOSES, Upload, file_object
from shared.keys.principal import Scope
from shared.text_files import require_utf8

router = APIRouter(prefix="/v1/files", tags=["files"], dependencies=[requires(Scope.BATCHES)])

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
EXPIRES_SECONDS_MIN, EXPIRES_SECONDS_MAX = 3600, 30 * 86_400
MAX_FILENAME = 512
MAX_PAGE, DEFAULT_PAGE = 10_000, 1_000
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def expires_seconds(anchor: Any, seconds: Any, param: str) -> float:
    """Parse `expires_after`. Raises InvalidParameter."""
    if anchor != "created_at":
        raise InvalidParameter(f"{param}.anchor must be created_at", param=f"{param}.anchor")
    number = whole_number(seconds) if isinstance(seconds, str) else seconds
    if (
        not isinstance(number, int)
        or isinstance(number, bool)
        or not EXPIRES_SECONDS_MIN <= number <= EXPIRES_SECONDS_MAX
    ):
        message = f"{param}.seconds must be from {EXPIRES_SECONDS_MIN} to {EXPIRES_SECONDS_MAX}"
        raise InvalidParameter(message, param=f"{param}.seconds")
    return float(number)


def _apply(form: Form, upload: Upload) -> None:
    """The form's fields, checked; they may come after the file."""
    only(form, FIELDS)
    if form.filename is None:
        raise MissingParameter("file is required", param="file")
    if "purpose" not in form.fields:
        raise MissingParameter("purpose is required", param="purpose")
    if form.fields["purpose"] not in PURPOSES:
        raise InvalidParameter(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    if not 1 <= len(form.filename) <= MAX_FILENAME or "\x00" in form.filename:
        raise InvalidParameter(
            f"the file's name must have 1 to {MAX_FILENAME} characters", param="file"
        )
    if not upload.bytes:
        raise InvalidParameter("the file is empty", param="file")
    require_utf8(upload.head, "the file", param="file")
    upload.filename = form.filename
    upload.purpose = form.fields["purpose"]
    if len(form.fields) > 1:
        anchor, seconds = (form.fields.get(name) for name in FIELDS[1:])
        upload.expires_seconds = expires_seconds(anchor, seconds, "expires_after")


@router.post("", openapi_extra=_FORM)
async def create_file(
    request: Request, context: ContextDep, principal: PrincipalDep
) -> dict[str, Any]:
    """Upload a file: purpose `batch` (requests of a batch) or `evals` (a dataset). Nothing of it is
    seen until it is whole.
    """
    async with context.files.upload(principal.tenant, purpose=PURPOSES[0]) as upload:
        form = await read_form(request, file_field="file", write=upload.write)
        _apply(form, upload)
    return file_object(await context.files.publish(upload))


@router.get("")
async def list_files(
    request: Request,
    context: ContextDep,
    principal: PrincipalDep,
    purpose: str | None = None,
    after: str | None = None,
    limit: str | None = None,
    order: str = "desc",
) -> dict[str, Any]:
    """The tenant's files, newest first."""
    no_nul(request)
    if order not in ("asc", "desc"):
        raise InvalidParameter("order must be asc or desc", param="order")
    size = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)
    rows = await context.files.page(
        principal.tenant, purpose=purpose, after=after, ascending=order == "asc", limit=size
    )
    return page_object([file_object(row) for row in rows], size)


@router.get("/{file_id}")
async def get_file(file_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    return file_object(await context.files.get(file_id, principal.tenant))


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def get_content(
    file_id: str, context: ContextDep, principal: PrincipalDep
) -> StreamingResponse:
    """The file's bytes. Should they vanish in the middle, the connection breaks rather than end
    early.
    """
    row = await context.files.get(file_id, principal.tenant)
    headers = {
        "Content-Length": str(row.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(row.filename)}",
    }
    return StreamingResponse(
        context.files.read(row), media_type="application/octet-stream", headers=headers
    )


@router.delete("/{file_id}")
async def delete_file(file_id: str, context: ContextDep, principal: PrincipalDep) -> dict[str, Any]:
    """409 while a batch still reads it."""
    await context.files.delete(file_id, principal.tenant)
    return {"id": file_id, "object": "file", "deleted": True}
