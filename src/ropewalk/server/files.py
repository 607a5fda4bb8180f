"""The Claude Files API: upload, list, metadata, content, delete."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ropewalk.errors import BadInput, DamagedContent, FileExpired, NotDownloadable
from ropewalk.files.catalog import File, Listing
from ropewalk.files.store import Store
from ropewalk.server import body, download
from ropewalk.server.auth import caller_of
from ropewalk.server.openapi import STRING, header, named, operation, query
from ropewalk.server.upload import MAX_TAG, MAX_TAGS, UploadForm, checked_tags
from ropewalk.server.wire import FILES_BETA, JSON, Cursors, Dialect, dialect, file_deleted, file_list, file_metadata

MAX_IDS = 100
DEFAULT_LIMIT, MAX_LIMIT = 20, 1000

BETA = header("anthropic-beta", STRING, f"{FILES_BETA}: lists and files in the shape they had before general availability")
UPLOAD_FORM = {
    "type": "object",
    "properties": {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "the bytes; a filename and a Content-Type may be left out",
        },
        "expires_in_seconds": {"type": "integer", "minimum": 3600, "maximum": 7_776_000},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": MAX_TAG}, "maxItems": MAX_TAGS},
    },
    "required": ["file"],
}


# -- upload ----------------------------------------------------------------------------------------------------------------------


@operation("upload a file", {200: named("File")}, media={"multipart/form-data": UPLOAD_FORM}, parameters=[BETA])
async def upload(request: Request) -> JSON:
    """POST /v1/files"""
    spoken = dialect(request.headers)
    async with AsyncExitStack() as stack:
        form = UploadForm(request, spoken, stack)
        async for chunk in body.read(request):
            await form.feed(chunk)
        file = await form.finish()
        request.state.committed = True
    return JSON(file_metadata(file, spoken))


# -- list ------------------------------------------------------------------------------------------------------------------------


@operation(
    "list files, newest first",
    {200: named("FileList")},
    parameters=[
        query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "files of a page"),
        query("page", STRING, "the next_page of the page before"),
        query("ids[]", {"type": "array", "items": STRING, "maxItems": MAX_IDS}, "only these; without page and limit"),
        query("before_id", STRING, "only in the older shape: files newer than this one"),
        query("after_id", STRING, "only in the older shape: files older than this one"),
        query("tag", STRING, "only files with this tag"),
        BETA,
    ],
)
async def list_files(request: Request) -> JSON:
    """GET /v1/files"""
    store: Store = request.app.state.store
    caller, spoken, asked = caller_of(request), dialect(request.headers), request.query_params
    _check_paging(request, spoken)
    ids = list(dict.fromkeys([*asked.getlist("ids[]"), *asked.getlist("ids")]))
    if ids:
        if len(ids) > MAX_IDS:
            raise BadInput(f"ids[]: {len(ids)} of them; at most {MAX_IDS} can be asked for at a time")
        return JSON(file_list(Listing(await store.find(caller, ids), False), spoken, None))
    limit = limit_of(request)
    if "scope_id" in asked:  # files made in a session; there are none here
        return JSON(file_list(Listing([], False), spoken, None))
    cursors, scope = Cursors(store.cursor_key), f"files {caller.workspace_id}/{caller.user_id or ''}"
    after = before = None
    if "page" in asked:
        after = cursors.read(scope, asked["page"])
    elif "after_id" in asked:
        after = (await _named(request, "after_id")).place
    elif "before_id" in asked:
        before = (await _named(request, "before_id")).place
    tag = asked.get("tag")
    listing = await store.list(caller, limit, after, before, None if tag is None else checked_tags([tag])[0])
    older = listing.files and (listing.more or before is not None)
    return JSON(file_list(listing, spoken, cursors.write(scope, listing.files[-1].place) if older else None))


def limit_of(request: Request) -> int:
    """How many items a page shall have."""
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MAX_LIMIT:
        raise BadInput(f"limit: '{text[:40]}' is not a whole number from 1 to {MAX_LIMIT}")
    return int(text)


def _check_paging(request: Request, spoken: Dialect) -> None:
    asked = request.query_params
    ways = [way for way in ("page", "ids[]", "ids", "before_id", "after_id") if way in asked]
    for way in ways:
        if way in ("before_id", "after_id") and not spoken.old_lists:
            raise BadInput(f"{way}: lists are paged with page and next_page; {way} is of anthropic-beta: {FILES_BETA}")
        if way in ("page", "ids[]", "ids") and not spoken.new_lists:
            raise BadInput(f"{way}: anthropic-beta: {FILES_BETA} knows only before_id, after_id and limit")
    if len({way.removesuffix("[]") for way in ways}) > 1:
        raise BadInput(f"{' and '.join(ways)}: only one of them can be given")
    if "limit" in asked and ("ids[]" in asked or "ids" in asked):
        raise BadInput("limit: it cannot be given together with ids[], which is answered on one page")


async def _named(request: Request, parameter: str) -> File:
    id = request.query_params[parameter]
    found = await request.app.state.store.find(caller_of(request), [id])
    if not found:
        raise BadInput(f"{parameter}: File `{id[:128]}` not found.")
    only: File = found[0]
    return only


# -- one file --------------------------------------------------------------------------------------------------------------------


@operation("what is known about a file", {200: named("File")}, parameters=[BETA])
async def metadata(request: Request) -> JSON:
    """GET /v1/files/{file_id}"""
    spoken = dialect(request.headers)
    return JSON(file_metadata(await request.app.state.store.show(caller_of(request), request.path_params["file_id"]), spoken))


@operation("delete a file, and all that was made from it", {200: named("DeletedFile")})
async def delete(request: Request) -> JSON:
    """DELETE /v1/files/{file_id}"""
    spoken, id = dialect(request.headers), request.path_params["file_id"]
    receipt = await request.app.state.store.delete(caller_of(request), id, request.state.request_id)
    return JSON(file_deleted(id, receipt.as_dict(), spoken))


@operation(
    "the bytes of a file",
    {200: {"type": "string", "format": "binary"}, 206: {"type": "string", "format": "binary"}, 304: None},
    parameters=[
        header("range", STRING, "one range of bytes, such as bytes=0-99"),
        header("if-none-match", STRING, "the ETag that the client has already"),
    ],
    answer_media="*/*",
)
async def content(request: Request) -> Response:
    """GET /v1/files/{file_id}/content"""
    store: Store = request.app.state.store
    caller, id = caller_of(request), request.path_params["file_id"]
    dialect(request.headers)
    if request.method == "HEAD" or "if-none-match" in request.headers:
        caller.needs("download")
        file = await store.show(caller, id)
        if file.expired:
            raise FileExpired(f"File `{id}` has expired.")
        if not file.downloadable:
            raise NotDownloadable(f"File `{id}` is not downloadable: its workspace does not give uploads back.")
        if download.is_known(request, file):
            return download.not_modified(file)
        if request.method == "HEAD":
            return download.head(file)
    opened = await store.open_content(caller, id, download=True, request_id=request.state.request_id)
    span = download.asked_span(request, opened.file)
    chunks = opened.chunks(*span) if span else opened.chunks()
    return await download.answer(opened.file, span, _reporting(store, opened.name, chunks))


async def _reporting(store: Store, name: str, chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """The same chunks; damage is written down before it is raised."""
    try:
        async with aclosing(chunks) as opened:
            async for chunk in opened:
                yield chunk
    except DamagedContent:
        await store.mark_damaged(name)
        raise


routes: list[BaseRoute] = [
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", list_files),
    Route("/v1/files/{file_id}", metadata),
    Route("/v1/files/{file_id}", delete, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", content),
]
