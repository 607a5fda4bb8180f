"""The store's files as OpenAI's clients speak of them: the same ids, quotas, receipts and audit as under /v1/files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.errors import BadInput
from ropewalk.files.catalog import UNSAID, File
from ropewalk.files.incoming import checked_expiry
from ropewalk.files.store import Store
from ropewalk.server import body, files
from ropewalk.server.auth import caller_of
from ropewalk.server.upload import UploadForm
from ropewalk.server.wire import JSON, dialect

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MAX_LIMIT = 10_000
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


class PurposeForm(UploadForm):
    """The form of an upload, with a purpose."""

    fields = ("file", "purpose", ANCHOR, SECONDS)

    def about(self, values: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """What the fields say of the file, as Incoming.finish takes it."""
        told = {name: [value for key, value in values if key == name] for name in self.fields[1:]}
        for name, found in told.items():
            if len(found) > 1:
                raise _wrong(name, f"the form has {len(found)} of them; expected one")
        if not told["purpose"]:
            raise _wrong("purpose", f"Field required; expected one of {', '.join(PURPOSES)}")
        purpose, anchor, seconds = told["purpose"][0], *(told[name] for name in (ANCHOR, SECONDS))
        if purpose not in PURPOSES:
            raise _wrong("purpose", f"'{purpose[:100]}' is none; expected one of {', '.join(PURPOSES)}")
        if bool(anchor) != bool(seconds) or (anchor and anchor[0] != "created_at"):
            raise _wrong("expires_after", "expected an anchor, which is created_at, and seconds")
        return {"purpose": purpose, "expires_in": _seconds(seconds[0]) if seconds else None}


async def create(request: Request) -> JSON:
    """POST /openai/v1/files"""
    async with AsyncExitStack() as stack:
        form = PurposeForm(request, dialect(request.headers), stack)
        async for chunk in body.read(request):
            await form.feed(chunk)
        file = await form.finish()
        request.state.committed = True
    return JSON(file_object(file))


async def list_files(request: Request) -> JSON:
    """GET /openai/v1/files"""
    store: Store = request.app.state.store
    caller, asked = caller_of(request), request.query_params
    limit, order, purpose = _limit(asked.get("limit", str(MAX_LIMIT))), asked.get("order", "desc"), asked.get("purpose")
    if order not in ("asc", "desc"):
        raise _wrong("order", f"'{order[:40]}' is none; expected asc or desc")
    if purpose is not None and purpose not in PURPOSES:
        raise _wrong("purpose", f"'{purpose[:100]}' is none; expected one of {', '.join(PURPOSES)}")
    place = None
    if "after" in asked:
        found = await store.find(caller, [asked["after"]])
        if not found:
            raise _wrong("after", f"File `{asked['after'][:128]}` not found.")
        place = found[0].place
    if order == "desc":
        listing = await store.list(caller, limit, after=place, purpose=purpose)
        page = listing.files
    else:  # the older end first: what is newer than nothing is everything
        listing = await store.list(caller, limit, before=place or (-1, ""), purpose=purpose)
        page = listing.files[::-1]
    ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    return JSON({"object": "list", "data": [file_object(file) for file in page], **ends, "has_more": listing.more})


async def show(request: Request) -> JSON:
    """GET /openai/v1/files/{file_id}"""
    return JSON(file_object(await request.app.state.store.show(caller_of(request), request.path_params["file_id"])))


async def content(request: Request) -> Response:
    """GET /openai/v1/files/{file_id}/content"""
    return await files.content(request)


async def delete(request: Request) -> JSON:
    """DELETE /openai/v1/files/{file_id}"""
    id = request.path_params["file_id"]
    receipt = await request.app.state.store.delete(caller_of(request), id, request.state.request_id)
    told = {"receipt": receipt.as_dict()} if dialect(request.headers).extensions else {}
    return JSON({"id": id, "object": "file", "deleted": True, **told}, headers={"x-ropewalk-receipt": str(receipt.sequence)})


def file_object(file: File) -> dict[str, Any]:
    """What is told about a file."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created_at // 1_000_000,
        "expires_at": None if file.expires_at is None else file.expires_at // 1_000_000,
        "filename": file.filename,
        "purpose": file.purpose or UNSAID,
        "status": "error" if file.expired else "processed",
        "status_details": "expired" if file.expired else None,
    }


def _limit(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise _wrong("limit", f"'{text[:40]}' is not a whole number from 1 to {MAX_LIMIT}")
    return int(text)


def _seconds(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,12}", text):
        raise _wrong("expires_after", f"'{text[:40]}' is not a whole number of seconds")
    checked = checked_expiry(int(text))
    assert checked is not None
    return checked


def _wrong(name: str, why: str) -> BadInput:
    error = BadInput(f"{name}: {why}")
    error.param = name
    return error


routes: list[BaseRoute] = [
    Route("/openai/v1/files", create, methods=["POST"]),
    Route("/openai/v1/files", list_files),
    Route("/openai/v1/files/{file_id}", show),
    Route("/openai/v1/files/{file_id}", delete, methods=["DELETE"]),
    Route("/openai/v1/files/{file_id}/content", content),
]
